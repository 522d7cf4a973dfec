"""How each operand of a product is brought to eight bits, by the name of a recipe."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.ops import fp8
from moe_jax.ops.fp8 import E4M3, E5M2, TILE, Quantized, Tile


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How one operand, [..., rows, summed] or the other way round, is quantised.

    rows, summed: numbers that share a scale, across and along the dim that the product sums over;
      None: all. Leading dims (of experts) never share one.
    least: see `fp8.quantize`.
    """

    rows: int | None
    summed: int | None
    dtype: jnp.dtype = E4M3
    power_of_two: bool = False
    least: float = 0.0

    def tile(self, ndim: int, summed_dim: int) -> Tile:
        """The tile of an array whose last two dims are an operand, summed over `summed_dim`."""
        assert summed_dim in (ndim - 2, ndim - 1), (ndim, summed_dim)
        pair = (self.rows, self.summed) if summed_dim == ndim - 1 else (self.summed, self.rows)
        return (*(1,) * (ndim - 2), *pair)

    def quantize(self, x: jax.Array, summed_dim: int) -> Quantized:
        tile = self.tile(x.ndim, summed_dim)
        return fp8.quantize(x, tile, self.dtype, power_of_two=self.power_of_two, least=self.least)

    def rounded(self, x: jax.Array, summed_dim: int, scales: jax.Array | None = None) -> jax.Array:
        """The float32 numbers that `quantize` makes of x, or those by given scales."""
        tile = self.tile(x.ndim, summed_dim)
        scales = self.scales_of(fp8.largest(x, tile)) if scales is None else scales
        return fp8.rounded(x, tile, self.dtype, scales=scales)

    def scales_of(self, largest: jax.Array) -> jax.Array:
        """Of tiles with these largest magnitudes."""
        options = {"power_of_two": self.power_of_two, "least": self.least}
        return fp8.scales_of(largest, self.dtype, **options)

    def dequantize(self, x: Quantized, summed_dim: int, dtype: jnp.dtype) -> jax.Array:
        return fp8.dequantize(x, self.tile(x.values.ndim, summed_dim), dtype)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The operands of a layer's three products.

    activation: times `weight` in the forward product, times `gradient` in the weight's gradient.
    weight: the same numbers in the forward product and in the input's gradient.
    gradient: of the result; times `weight` in the input's gradient.
    delayed: scales are of the largest numbers of the last batches. Experts' products, which rows
      reach in rounds, have current ones all the same.
    """

    activation: Scaling
    weight: Scaling
    gradient: Scaling
    delayed: bool = False


# DeepSeek's kernels take 1e-4 for the least of the largest numbers. Gradients here are of a loss
# that is divided by the whole batch's tokens already, and lie below it.
_LEAST = 1e-4
_TILES = Scaling(1, TILE, least=_LEAST)
_WHOLE = Scaling(None, None, least=_LEAST)
_MX = Scaling(1, 32, power_of_two=True)

RECIPES = {
    # DeepSeek-V3, section 3.3.2: 1x128 along the summed dim, 128x128 for weights, E4M3 throughout.
    "fp8_block": Recipe(_TILES, Scaling(TILE, TILE, least=_LEAST), Scaling(1, TILE)),
    # One scale a tensor, and a wider format for gradients (Micikevicius et al. 2022); of its own
    # largest number, or of the last batches'.
    "fp8_tensor": Recipe(_WHOLE, _WHOLE, Scaling(None, None, E5M2)),
    "fp8_delayed": Recipe(_WHOLE, _WHOLE, Scaling(None, None, E5M2), delayed=True),
    # OCP's microscaling formats (2023), with the exponent rounded up so that nothing saturates
    # (Mishra et al. 2025).
    "mxfp8": Recipe(_MX, _MX, _MX),
}
# What is kept for the backward pass of what no product takes.
KEPT = Scaling(1, TILE, least=_LEAST)
# What travels to experts: power-of-two scales, so that quantising it again changes nothing.
DISPATCHED = Scaling(1, TILE, power_of_two=True, least=_LEAST)
DISPATCHED_GRADIENT = Scaling(1, TILE, power_of_two=True)
