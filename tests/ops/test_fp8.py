"""Numbers of eight bits against `ml_dtypes`, bit for bit."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from emulated import quick_jit

from moe_jax.ops import fp8
from moe_jax.ops.fp8 import E4M3, E5M2, Tile

NUMPY = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
TILES: list[Tile] = [(1, 128), (128, 1), (128, 128), (1, 32), (None, None)]


def _tiles(shape: tuple[int, ...], tile: Tile) -> list[tuple[slice, ...]]:
    sizes = [dim if size is None else size for size, dim in zip(tile, shape, strict=True)]
    starts = (range(0, dim, size) for size, dim in zip(sizes, shape, strict=True))
    return [
        tuple(slice(start, start + size) for start, size in zip(at, sizes, strict=True))
        for at in itertools.product(*starts)
    ]


def _reference(
    x: np.ndarray, tile: Tile, dtype: jnp.dtype, power_of_two: bool, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values as bytes, and the numbers that they stand for."""
    most = np.float32(ml_dtypes.finfo(NUMPY[dtype]).max)
    values, numbers = np.zeros(x.shape, np.uint8), np.zeros(x.shape, np.float32)
    with np.errstate(all="ignore"):
        for place in _tiles(x.shape, tile):
            part = x[place].astype(np.float32)
            scale = np.maximum(np.max(np.abs(part)), np.float32(max(least, most * 2.0**-100)))
            scale = np.float32(scale * np.float32(1 / most))
            if power_of_two and np.isfinite(scale):
                mantissa, exponent = np.frexp(scale)
                scale = np.float32(np.ldexp(1.0, exponent - (mantissa == 0.5)))
            scaled = part / scale
            scaled = np.where(np.isfinite(scaled), np.clip(scaled, -most, most), np.nan)
            narrow = scaled.astype(np.float32).astype(NUMPY[dtype])
            values[place], numbers[place] = narrow.view(np.uint8), narrow.astype(np.float32) * scale
    return values, numbers


def _nasty(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 200)) * np.exp(4 * rng.normal(size=(300, 200)))
    x[:5], x[5, :7] = 0.0, -0.0
    x[140:150] = rng.normal(size=(10, 200)) * 1e-36
    x[150:160] = rng.normal(size=(10, 200)) * 1e36
    x[7, 3], x[200, 150], x[299, 199] = np.nan, np.inf, -np.inf
    return np.asarray(jnp.asarray(x, dtype))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_equals_ml_dtypes(tile: Tile, dtype: jnp.dtype, power_of_two: bool) -> None:
    for input_dtype, least in (("float32", 0.0), ("bfloat16", 1e-4)):
        x = _nasty(input_dtype)
        options = {"power_of_two": power_of_two, "least": least}
        values, numbers = _reference(x, tile, dtype, power_of_two, least)

        def both(x, options=options):
            quantized = fp8.quantize(x, tile, dtype, **options)
            rounded = fp8.rounded(x, tile, dtype, **options)
            return quantized, fp8.dequantize(quantized, tile), rounded

        quantized, *results = jax.jit(both)(x)
        finite, nan = np.isfinite(numbers), np.isnan(x.astype(np.float32))
        tiles_of_nan = np.zeros(x.shape, bool)
        for place in _tiles(x.shape, tile):
            # What a NaN leaves of its tile is not said; an infinity leaves nothing.
            infinite = np.isinf(x[place].astype(np.float32)).any()
            tiles_of_nan[place] = nan[place].any() and not infinite
        np.testing.assert_array_equal(
            np.asarray(quantized.values).view(np.uint8)[finite], values[finite]
        )
        for result in map(np.asarray, results):
            assert np.isnan(result[nan]).all()
            np.testing.assert_array_equal(np.isnan(result)[~tiles_of_nan], ~finite[~tiles_of_nan])
            np.testing.assert_array_equal(
                result[finite].view(np.int32), numbers[finite].view(np.int32)
            )


@pytest.mark.parametrize("dim", [1, 128, 200, 576])
def test_the_last_tile_is_shorter(dim: int) -> None:
    x = np.random.default_rng(1).normal(size=(3, dim)).astype(np.float32)
    quantized = quick_jit(lambda x: fp8.quantize(x, (1, 128)))(x)
    assert quantized.scales.shape == (3, -(-dim // 128))
    np.testing.assert_array_equal(
        np.asarray(quantized.values).view(np.uint8), _reference(x, (1, 128), E4M3, False, 0.0)[0]
    )


def test_numbers_beyond_given_scales_become_the_largest() -> None:
    x, tile = jnp.array([[448.0, 449.0, -1e30, 3.0, jnp.inf, jnp.nan]]), (None, None)
    got = fp8.dequantize(fp8.quantize(x, tile, scales=jnp.ones((1, 1))), tile)
    np.testing.assert_array_equal(got, [[448.0, 448.0, -448.0, 3.0, np.nan, np.nan]])


def test_powers_of_two_are_rounded_up() -> None:
    x = jnp.array([1.0, 1.0000001, 2.0**-126, 3.0, 4.0, jnp.inf, jnp.nan])
    expected = [1.0, 2.0, 2.0**-126, 4.0, 4.0, np.inf, np.nan]
    np.testing.assert_array_equal(fp8.round_up_to_power_of_two(x), expected)


def test_quantising_again_by_powers_of_two_changes_nothing() -> None:
    x = np.random.default_rng(2).standard_t(2, size=(64, 300)).astype(np.float32)
    once = fp8.rounded(x, (1, 128), power_of_two=True)
    assert np.any(once != x)
    np.testing.assert_array_equal(fp8.rounded(once, (1, 128), power_of_two=True), once)
    np.testing.assert_array_equal(once.astype(jnp.bfloat16).astype(jnp.float32), once)


def test_a_tile_says_nothing_of_others() -> None:
    x = np.random.default_rng(3).normal(size=(2, 256)).astype(np.float32)
    other = x.copy()
    other[:, 128:] *= 1000
    got, expected = (fp8.rounded(a, (1, 128))[:, :128] for a in (other, x))
    np.testing.assert_array_equal(got, expected)
