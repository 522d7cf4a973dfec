"""Numbers of eight bits by numpy and ml_dtypes, a tile at a time, and what recipes do with them.

Nothing of `moe_jax` is used here.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
LEAST_SCALE = 2.0**-100

Tile = Sequence[int | None]


class Operand(NamedTuple):
    """How a recipe has an operand of a product: numbers that share a scale, by the operand's rows
    and along the dim that is summed over; None is all."""

    rows: int | None
    summed: int | None
    form: str = "e4m3"
    power_of_two: bool = False
    least: float = 0.0

    def rounded(self, x: np.ndarray, summed_dim: int) -> np.ndarray:
        """A matrix, or one for each expert, as a product takes it."""
        pair = (self.rows, self.summed) if summed_dim == x.ndim - 1 else (self.summed, self.rows)
        tile = (*[1] * (x.ndim - 2), *pair)
        scales = scales_of(x, tile, self.form, self.power_of_two, self.least)
        return dequantized(quantized(x, scales, tile, self.form), scales, tile)


# Of activation, weight and gradient.
RECIPES = {
    "fp8_block": (
        Operand(1, 128, least=1e-4),
        Operand(128, 128, least=1e-4),
        Operand(1, 128),
    ),
    "fp8_tensor": (
        Operand(None, None, least=1e-4),
        Operand(None, None, least=1e-4),
        Operand(None, None, "e5m2"),
    ),
    "mxfp8": (Operand(1, 32, power_of_two=True),) * 3,
}
KEPT = Operand(1, 128, least=1e-4)
DISPATCHED = Operand(1, 128, power_of_two=True, least=1e-4)
DISPATCHED_GRADIENT = Operand(1, 128, power_of_two=True)


def places(shape: Sequence[int], tile: Tile) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Of each tile: its number along each dim, and its part of the array."""
    starts = [
        range(0, dim, dim if size is None else size) for dim, size in zip(shape, tile, strict=True)
    ]
    return [
        (
            tuple(r.index(start) for r, start in zip(starts, corner, strict=True)),
            tuple(slice(start, start + r.step) for r, start in zip(starts, corner, strict=True)),
        )
        for corner in itertools.product(*starts)
    ]


def scales_of(
    x: np.ndarray, tile: Tile, form: str, power_of_two: bool = False, least: float = 0.0
) -> np.ndarray:
    """Float32, rounded once or up to a power of two; not finite where a number of the tile is not.

    XLA multiplies by the inverse of 448, so that its own may be the next or the last float32.
    """
    x, parts = x.astype(np.float64), places(x.shape, tile)
    scales = np.zeros([index + 1 for index in parts[-1][0]], np.float32)
    for index, part in parts:
        largest = np.max(np.abs(x[part]))
        scale = np.float32(max(largest, least) / LARGEST[form])
        scale = scale if scale > LEAST_SCALE else np.float32(LEAST_SCALE)
        if power_of_two and np.isfinite(largest):
            fraction, exponent = np.frexp(np.float64(scale))
            scale = np.ldexp(1.0, exponent - (fraction == 0.5))
        scales[index] = scale if np.isfinite(largest) else np.nan
    return scales


def quantized(x: np.ndarray, scales: np.ndarray, tile: Tile, form: str) -> np.ndarray:
    """In the type of eight bits; NaN where the scale is no number."""
    x, values = x.astype(np.float32), np.zeros(x.shape, DTYPES[form])
    for index, part in places(x.shape, tile):
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = np.clip(x[part] / scales[index], -LARGEST[form], LARGEST[form])
        scaled[~np.isfinite(x[part])] = np.nan
        values[part] = scaled.astype(DTYPES[form])
    return values


def dequantized(values: np.ndarray, scales: np.ndarray, tile: Tile) -> np.ndarray:
    numbers = values.astype(np.float32)
    for index, part in places(values.shape, tile):
        with np.errstate(over="ignore"):
            numbers[part] *= scales[index]
    return numbers
