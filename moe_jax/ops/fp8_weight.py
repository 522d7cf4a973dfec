"""A weight that stays in eight bits and is widened where it is used, for inference.

It takes the place of an array in a tree of parameters. Layers read weights as `weight[...]`, and so
a scan over layers widens those of one at a time.
"""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp

from moe_jax.ops.fp8 import TILE, Quantized, dequantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """In DeepSeek-V3's public form: a scale for each 128 inputs times 128 results.

    values: [..., *in_dims, *out_dims] float8_e4m3fn; leading dims are of layers and experts.
    scales: [..., blocks of all inputs, blocks of all results] float32.
    num_in_dims: how many dims a product sums over.
    dtype: of what is read.
    """

    values: jax.Array
    scales: jax.Array
    num_in_dims: int = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: types.EllipsisType) -> jax.Array:
        """The whole weight: `weight[...]`."""
        assert index is ..., index
        shape, leading = self.values.shape, self.scales.ndim - 2
        results = leading + self.num_in_dims
        matrix = math.prod(shape[leading:results]), math.prod(shape[results:])
        values = self.values.reshape(*shape[:leading], *matrix)
        tile = (*(1,) * leading, TILE, TILE)
        return dequantize(Quantized(values, self.scales), tile, self.dtype).reshape(shape)
