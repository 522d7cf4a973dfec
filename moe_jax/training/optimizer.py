"""AdamW, and which parameters decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import OptimizerConfig

Tree = Any  # nested dicts of arrays


def decayed(parameters: Tree, decay_all: bool) -> Tree:
    """True for each parameter that decays: norms and the router do not, unless `decay_all`."""

    def decays(path: tuple, _: jax.Array) -> bool:
        names = {str(key.key) for key in path}
        return decay_all or not names & {"scale", "router"}

    return jax.tree_util.tree_map_with_path(decays, parameters)


class AdamW:
    """AdamW with clipping by the global norm, on plain trees.

    Its state is {"mu": tree, "nu": tree}; the count of updates belongs to the train state.
    """

    def __init__(self, config: OptimizerConfig):
        self._config = config
        self._clip = optax.clip_by_global_norm(config.clip_norm)
        self._adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
        self._decay = optax.add_decayed_weights(
            config.weight_decay, lambda parameters: decayed(parameters, config.decay_all)
        )

    def init(self, parameters: Tree) -> Tree:
        state: Any = self._adam.init(parameters)
        return self._stored({"mu": state.mu, "nu": state.nu})

    def update(
        self, gradients: Tree, moments: Tree, parameters: Tree, update: jax.Array, rate: jax.Array
    ) -> tuple[Tree, Tree]:
        """New parameters and new moments.

        Args:
          update: [] int32, updates done so far.
          rate: [] float32, the learning rate.
        """
        changes, _ = self._clip.update(gradients, optax.EmptyState())
        moments = jax.tree.map(lambda moment: moment.astype(jnp.float32), moments)
        state: Any = optax.ScaleByAdamState(count=update, **moments)
        changes, state = self._adam.update(changes, state)
        changes, _ = self._decay.update(changes, self._decay.init(parameters), parameters)
        changes = jax.tree.map(lambda change: -rate * change, changes)
        moments = self._stored({"mu": state.mu, "nu": state.nu})
        return optax.apply_updates(parameters, changes), moments

    def _stored(self, moments: Tree) -> Tree:
        return jax.tree.map(lambda moment: moment.astype(self._config.moments_dtype), moments)
