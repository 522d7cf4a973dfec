"""Numbers of eight bits with scales, by tile, by block or by tensor (DeepSeek-V3, section 3.3).

A tile is a part of an array that shares one scale, so that its largest number becomes the largest
that the format holds. Where a dim ends within a tile, that tile is shorter.

What is no number stays none: a NaN or an infinity makes its whole tile NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
TILE = 128

Tile = tuple[int | None, ...]  # its size along each dim; None: the whole dim


class Quantized(NamedTuple):
    """values * scales, each scale standing for its tile.

    values: [...] float8.
    scales: float32, a dim of tiles for each dim of values.
    """

    values: jax.Array
    scales: jax.Array


def quantize(
    x: jax.Array,
    tile: Tile,
    dtype: jnp.dtype = E4M3,
    *,
    power_of_two: bool = False,
    least: float = 0.0,
    scales: jax.Array | None = None,
) -> Quantized:
    """x in eight bits: its numbers are rounded to the nearest, even ones where two are as near.

    Args:
      x: [...] of any float dtype.
      tile: by dim of x.
      dtype: `E4M3` or `E5M2`.
      power_of_two: scales are rounded up to powers of two, so that scaling itself rounds nothing. A
        number of 3.3e38 or more rounds to 2**128, and so is infinite.
      least: a tile whose largest number is less is scaled as if it were this.
      scales: to use, in place of those of x's own largest numbers. Numbers beyond them become the
        largest of the format.
    """
    if scales is None:
        scales = scales_of(largest(x, tile), dtype, power_of_two=power_of_two, least=least)
    return Quantized(_scaled(x, scales, tile, dtype).astype(dtype), scales)


def dequantize(x: Quantized, tile: Tile, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The numbers that x stands for."""
    return (x.values.astype(jnp.float32) * expand(x.scales, tile, x.values.shape)).astype(dtype)


def rounded(
    x: jax.Array,
    tile: Tile,
    dtype: jnp.dtype = E4M3,
    *,
    power_of_two: bool = False,
    least: float = 0.0,
    scales: jax.Array | None = None,
) -> jax.Array:
    """The float32 numbers that `quantize` makes of x, bit for bit.

    They are rounded as float32, since a CPU casts to eight bits and back one by one.
    """
    if scales is None:
        scales = scales_of(largest(x, tile), dtype, power_of_two=power_of_two, least=least)
    scaled, info = _scaled(x, scales, tile, dtype), jnp.finfo(dtype)
    normal = jax.lax.reduce_precision(scaled, exponent_bits=8, mantissa_bits=info.nmant)
    step = float(info.smallest_subnormal)
    subnormal = jnp.round(scaled / step) * step
    numbers = jnp.where(jnp.abs(scaled) < float(info.tiny), subnormal, normal)
    return numbers * expand(scales, tile, x.shape)


def _scaled(x: jax.Array, scales: jax.Array, tile: Tile, dtype: jnp.dtype) -> jax.Array:
    """float32 within the format's range; NaN for what is no number."""
    wide, most = x.astype(jnp.float32), float(jnp.finfo(dtype).max)
    scaled = jnp.clip(wide / expand(scales, tile, x.shape), -most, most)
    return jnp.where(jnp.isfinite(wide), scaled, jnp.nan)


def largest(x: jax.Array, tile: Tile) -> jax.Array:
    """The largest magnitude of each tile, float32."""
    magnitudes = jnp.abs(x.astype(jnp.float32))
    # A compiled maximum may pass over a NaN, but finds an infinity.
    magnitudes = jnp.where(jnp.isnan(magnitudes), jnp.inf, magnitudes)
    for axis, (size, dim) in enumerate(zip(_sizes(tile, x.shape), x.shape, strict=True)):
        if size > 1:
            padding = [(0, -dim % size if other == axis else 0) for other in range(x.ndim)]
            before, after = magnitudes.shape[:axis], magnitudes.shape[axis + 1 :]
            tiles = jnp.pad(magnitudes, padding).reshape(*before, -1, size, *after)
            magnitudes = jnp.max(tiles, axis=axis + 1)
    return magnitudes


def scales_of(
    largest: jax.Array, dtype: jnp.dtype, *, power_of_two: bool = False, least: float = 0.0
) -> jax.Array:
    """The scales by which numbers up to these fill the format; float32.

    None is so small that its inverse were infinite.
    """
    most = float(jnp.finfo(dtype).max)
    # Times the inverse, since XLA divides by a constant in one way or another.
    scales = jnp.maximum(largest, max(least, most * 2.0**-100)) * jnp.float32(1 / most)
    return round_up_to_power_of_two(scales) if power_of_two else scales


def round_up_to_power_of_two(x: jax.Array) -> jax.Array:
    """The next power of two that is no less, of positive normal float32; NaN and infinity stay."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    fraction = (1 << 23) - 1
    power = jax.lax.bitcast_convert_type((bits + fraction) & ~fraction, jnp.float32)
    return jnp.where(jnp.isfinite(x), power, x)


def expand(scales: jax.Array, tile: Tile, shape: Sequence[int]) -> jax.Array:
    """Each scale for all numbers of its tile: of this shape, or 1 where a dim is one tile."""
    for axis, (size, dim) in enumerate(zip(_sizes(tile, shape), shape, strict=True)):
        if 1 < size < dim:
            before, after = scales.shape[: axis + 1], scales.shape[axis + 1 :]
            wide = jnp.broadcast_to(
                scales.reshape(*before, 1, *after), (*before, size, *after)
            ).reshape(*before[:-1], -1, *after)
            scales = jax.lax.slice_in_dim(wide, 0, dim, axis=axis)
    return scales


def _sizes(tile: Tile, shape: Sequence[int]) -> list[int]:
    return [
        max(1, dim if size is None else min(size, dim))
        for size, dim in zip(tile, shape, strict=True)
    ]
