"""When training goes wrong: bad steps are counted, rolled back, and after too many given up.

A step is bad if its update was skipped, or if its loss is a spike. Bad steps in a row lead back to
the newest checkpoint from before the first of them. The data moves on: that checkpoint's state is
taken as if it had been reached at the present step, so no batch that led into trouble is seen
again, and updates since the checkpoint are lost.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import RecoveryConfig
from moe_jax.fields import RunError
from moe_jax.training.checkpoint import Checkpoints

Tree = Any


class Guard:
    """Judges steps by their metrics, which all processes share, so all judge alike.

    Args:
      say: told for a person.
      saved: of `state`, in a checkpoint that the run goes on from.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
        saved: dict[str, Any] | None = None,
    ):
        saved = saved or {"bad": [], "losses": [], "rollbacks": []}
        self._config, self._checkpoints, self._say = config, checkpoints, say
        self.bad: list[int] = saved["bad"]  # steps, up to now, without a good one between
        self._losses = deque(saved["losses"], config.spike_window)
        self._rollbacks: list[str] = saved["rollbacks"]

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"bad": self.bad, "losses": list(self._losses), "rollbacks": self._rollbacks}

    def mended(self, step: int, metrics: dict[str, Any], state: Tree, batch: Tree) -> Tree:
        """The state to go on with after a step: as it is, or of the last good checkpoint.

        Raises:
          RunError: there is no such checkpoint, or too many rollbacks have been before.
        """
        fault = self._fault(metrics)
        if fault is None:
            self.bad.clear()
            self._losses.append(metrics["loss"])
            return state
        self._say(f"bad         step {step}: {fault}")
        if not self.bad:
            self._say_what_is_not_finite(state, batch)
        self.bad.append(step)
        if not 0 < self._config.max_bad_steps <= len(self.bad):
            return state
        self._rollbacks.append(f"steps {self.bad[0]} to {step}: {fault}")
        if len(self._rollbacks) > self._config.max_rollbacks:
            raise RunError(
                f"training went wrong {len(self._rollbacks)} times, more than "
                f"config.recovery.max_rollbacks={self._config.max_rollbacks} ("
                + "; ".join(self._rollbacks)
                + "); the checkpoints from before are as they were"
            )
        good, state = _roll_back(self._checkpoints, self.bad[0], step, state)
        self._say(f"rolled back to checkpoint {good}; the data goes on after step {step}")
        self.bad.clear()
        return state

    def _fault(self, metrics: dict[str, Any]) -> str | None:
        """Why this step is bad; None: it is not."""
        loss = metrics["loss"]
        if metrics["update_skipped"]:
            return _skipped(metrics)
        sigmas, losses = self._config.spike_sigmas, self._losses
        if not sigmas or len(losses) < self._config.spike_window:
            return None
        mean, sigma = statistics.fmean(losses), statistics.pstdev(losses)
        if loss <= mean + sigmas * sigma:
            return None
        return (
            f"loss {loss:.4f} is a spike: the last ones are {mean:.4f} with a sigma of {sigma:.4f}"
        )

    def _say_what_is_not_finite(self, state: Tree, batch: Tree) -> None:
        for name in not_finite({**state, "batch": batch}):
            self._say(f"            {name} is not finite")


def _skipped(metrics: dict[str, Any]) -> str:
    """What of a skipped step was no number."""
    if not math.isfinite(metrics["loss"]):
        text = "update skipped: the loss is not finite"
    elif not math.isfinite(metrics["grad_norm"]):
        text = "update skipped: the gradient is not finite"
    else:
        text = "update skipped: a router bias is not finite"
    layer = metrics.get("first_router_not_finite", -1)
    return text if layer < 0 else f"{text}; scores of the router in routed layer {layer} are not"


def _roll_back(checkpoints: Checkpoints, before: int, step: int, state: Tree) -> tuple[int, Tree]:
    """The step of the newest whole checkpoint below `before`, and its state as if at `step`.

    Args:
      state: the present one, whose memory is given back.
    """
    good = checkpoints.latest(before)
    if good is None:
        raise RunError(
            f"training goes wrong since step {before}, and there is no checkpoint from before to "
            "go back to; change the config, or save earlier with config.checkpoint.every_steps"
        )
    layout = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    jax.tree.map(lambda x: x.delete(), state)
    restored = checkpoints.restore(good, layout)
    # On its own device, or on each process's: a number, and the same everywhere.
    advance = jax.jit(lambda old: old * 0 + step)
    return good, {**restored, "step": advance(restored["step"])}


def not_finite(trees: Tree) -> list[str]:
    """The arrays that hold something that is no number, with the place of the first, if it is here.

    "parameters/moe_blocks/moe/gate[0, 3, 5, 1]"; all processes must ask.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    fine = jax.jit(lambda leaves: jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), leaves))(leaves)
    return [f"{name}{_place(leaves[name])}" for name, holds in fine.items() if not holds]


def _place(x: jax.Array) -> str:
    for shard in x.addressable_shards:
        bad = np.argwhere(~np.isfinite(np.asarray(shard.data)))
        if len(bad):
            starts = [part.start or 0 for part in shard.index]
            return str([int(i + start) for i, start in zip(bad[0], starts, strict=True)])
    return ""
