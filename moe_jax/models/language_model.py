"""A decoder with its weights on a mesh, ready to call."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from moe_jax import sharding
from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.moe import PlacementTable
from moe_jax.models.decoder import Decoder, RouterBias
from moe_jax.ops.fp8_weight import Fp8Weight

Tree = Any  # nested dicts of arrays


class LanguageModel:
    """`model(tokens)` gives logits; the arrays are `model.parameters` and `model.router_bias`.

    Args:
      parameters, router_bias: as `abstract_weights` describes them; a parameter may be an
        `Fp8Weight` of that shape.
      placement: [layers, experts, most replicas] int32, where `parameters` have redundant experts
        (`inference/redundancy.py`).
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: PrecisionConfig,
        mesh: Mesh,
        parameters: Tree,
        router_bias: Tree,
        placement: jax.Array | None = None,
    ):
        # Recipes are of training: here products are as wide as weights.
        precision = dataclasses.replace(precision, recipe="none")
        self.config, self.precision, self.mesh = config, precision, mesh
        self.parameters, self.router_bias = parameters, router_bias
        self.placement = {}
        with jax.set_mesh(mesh):
            decoder = _shapes(config, precision)
        if placement is not None:
            decoder.moe_blocks.moe.placement = PlacementTable(jax.typeof(placement))
            self.placement = {"moe_blocks": {"moe": {"placement": placement}}}
        self.graphdef = nnx.graphdef(decoder)
        self._logits = jax.jit(self.apply)

    @property
    def fp8_weights(self) -> bool:
        """Whether any stay in eight bits (`ops/fp8_weight.py`)."""
        leaves = jax.tree.leaves(self.parameters, is_leaf=lambda x: isinstance(x, Fp8Weight))
        return any(isinstance(leaf, Fp8Weight) for leaf in leaves)

    @property
    def weights(self) -> tuple[Tree, ...]:
        """All arrays, as `nnx.merge(model.graphdef, *model.weights)` takes them."""
        return self.parameters, self.router_bias, self.placement

    def apply(self, parameters: Tree, router_bias: Tree, *inputs: jax.Array) -> jax.Array:
        """`Decoder.__call__` as a pure function, to be transformed under `jax.set_mesh(mesh)`."""
        return nnx.merge(self.graphdef, parameters, router_bias, self.placement)(*inputs)

    def __call__(
        self,
        tokens: np.ndarray | jax.Array,
        positions: np.ndarray | jax.Array | None = None,
        segment_ids: np.ndarray | jax.Array | None = None,
    ) -> jax.Array:
        """Logits [batch, length, vocab] float32.

        Args:
          tokens, positions, segment_ids: [batch, length] int32; without the last two, a row is one
            document. Any number of rows: they are filled up to what the mesh divides.
        """
        rows, length = np.shape(tokens)
        if positions is None:
            positions = np.broadcast_to(np.arange(length), (rows, length))
        if segment_ids is None:
            segment_ids = np.ones((rows, length))
        inputs = [self.place(x) for x in (tokens, positions, segment_ids)]
        with jax.set_mesh(self.mesh):
            logits = self._logits(self.parameters, self.router_bias, *inputs)
            return logits if len(logits) == rows else sharding.gather(logits)[:rows]

    def place(self, rows: np.ndarray | jax.Array) -> jax.Array:
        """[batch, ...] int32 on the mesh, filled up with rows of zeros to what its axes divide."""
        rows = np.asarray(rows, np.int32)
        parts = sharding.num_shards(dict(self.mesh.shape), sharding.BATCH_AXES)
        padding = [(0, -len(rows) % parts)] + [(0, 0)] * (rows.ndim - 1)
        filled = np.pad(rows, padding)
        by_rows = NamedSharding(self.mesh, sharding.BATCH)
        return jax.make_array_from_callback(filled.shape, by_rows, lambda index: filled[index])


def abstract_weights(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    dtype: Any = jnp.float32,
    *,
    decoding: bool = False,
) -> tuple[Tree, Tree]:
    """Shapes, dtypes and shardings of a model's parameters and router biases.

    Args:
      mesh: `sharding.abstract_mesh` where no devices are needed.
      decoding: whether dense weights are whole on all devices among which experts are split. There
        is no time to gather them for each token.
    Returns:
      Two nested dicts of `jax.ShapeDtypeStruct`; parameters are `dtype`, biases float32.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = _shapes(config, PrecisionConfig())
    _, parameters, router_bias = nnx.split(model, nnx.Param, RouterBias)

    def placed(path: Any, x: Any, dtype: Any) -> jax.ShapeDtypeStruct:
        # A value that no axis splits has no sharding of its own here.
        spec = x.sharding.spec if x.sharding else sharding.P()
        if decoding and path[-2:-1] != (jax.tree_util.DictKey("moe"),):
            spec = sharding.without(spec, sharding.EXPERT_AXES)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, spec))

    return (
        jax.tree.map_with_path(
            functools.partial(placed, dtype=dtype), nnx.to_pure_dict(parameters)
        ),
        jax.tree.map_with_path(
            functools.partial(placed, dtype=jnp.float32), nnx.to_pure_dict(router_bias)
        ),
    )


def _shapes(config: ModelConfig, precision: PrecisionConfig) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, precision, rngs=nnx.Rngs(0)))
