"""Numbers of eight bits, bit for bit those of numpy and ml_dtypes."""

import functools
from typing import Any

import fp8_reference
import jax
import ml_dtypes
import numpy as np
import pytest
from emulated import quick_jit
from fp8_reference import DTYPES, LARGEST, Tile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_jax.ops import fp8

TILES: dict[str, Tile] = {
    "1x128": (1, 128),
    "128x1": (128, 1),
    "128x128": (128, 128),
    "1x32": (1, 32),
    "tensor": (None, None),
}
SHAPES = (200, 576), (130, 1), (1, 128), (1, 1)


@functools.cache
def _compiled(tile: Tile, form: str, power_of_two: bool = False, least: float = 0.0):
    """x, and scales if given, to (quantised, dequantised, rounded)."""

    def function(x, scales=None):
        options = {"power_of_two": power_of_two, "least": least, "scales": scales}
        quantized = fp8.quantize(x, tile, fp8.FORMATS[form], **options)
        rounded = fp8.rounded(x, tile, fp8.FORMATS[form], **options)
        return quantized, fp8.dequantize(quantized, tile), rounded

    compiled = quick_jit(function)
    return lambda *inputs: jax.tree.map(np.asarray, compiled(*inputs))


def _assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """NaN is NaN, whatever its bits; zeros have signs."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    missing = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(actual.astype(np.float32)), missing)
    unsigned = f"u{actual.dtype.itemsize}"
    bits = [np.where(missing, 0, x.view(unsigned)) for x in (actual, expected)]
    np.testing.assert_array_equal(*bits)


def _check(
    x: np.ndarray, tile: Tile, form: str, power_of_two: bool = False, least: float = 0.0
) -> np.ndarray:
    """Against numpy; gives the numbers that it rounds to."""
    quantized, dequantized, rounded = _compiled(tile, form, power_of_two, least)(x)
    expected = fp8_reference.scales_of(x, tile, form, power_of_two, least)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(quantized.scales), finite)
    rtol = 0 if power_of_two else 2.0**-23  # the next float32
    np.testing.assert_allclose(quantized.scales[finite], expected[finite], rtol=rtol)

    scales = np.where(finite, quantized.scales, np.nan)
    values = fp8_reference.quantized(x, scales, tile, form)
    numbers = fp8_reference.dequantized(values, scales, tile)
    whole = np.isfinite(numbers)
    _assert_same_bits(quantized.values[whole], values[whole])
    _assert_same_bits(dequantized, numbers)
    _assert_same_bits(rounded, numbers)
    return rounded


def _wide(rng: np.random.Generator, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """Of both signs and magnitudes from 1e-38 to 3e38, if so widely spread; and zeros."""
    magnitudes = np.clip(np.exp(spread * rng.normal(size=shape)), 1e-38, 3e38)
    return magnitudes * rng.choice([-1.0, -0.0, 0.0, 1.0], size=shape, p=[0.4, 0.1, 0.1, 0.4])


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "power of two"])
@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_equals_numpy_bit_for_bit(tile: Tile, form: str, power_of_two: bool) -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for spread in (1.0, 8.0, 40.0):
            x = _wide(rng, shape, spread).astype(np.float32)
            _check(x, tile, form, power_of_two)
        _check(x.astype(ml_dtypes.bfloat16), tile, form, power_of_two)
        _check(1e-6 * rng.normal(size=shape), tile, form, power_of_two, least=1e-4)


def test_leading_dims_share_no_scale() -> None:
    x = _wide(np.random.default_rng(0), (3, 150, 40), 8.0).astype(np.float32)
    _check(x, (1, 128, 128), "e4m3")
    _check(x, (1, None, None), "e5m2")


def _of_all_bits(form: str) -> np.ndarray:
    """Finite numbers of a format, float32, ascending; zero once."""
    numbers = np.arange(256, dtype=np.uint8).view(DTYPES[form]).astype(np.float32)
    return np.unique(numbers[np.isfinite(numbers)])


@pytest.mark.parametrize("form", DTYPES)
def test_every_number_of_a_format_and_what_lies_between(form: str) -> None:
    """Subnormal ones too; a number half-way goes to the even one."""
    numbers = _of_all_bits(form)
    halfway = numbers[:-1] + np.diff(numbers) / 2  # exact
    sides = [np.nextafter(halfway, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([numbers, [np.float32(-0.0)], halfway, *sides])[None]
    scales = np.ones((1, 1), np.float32)
    quantized, dequantized, rounded = _compiled((None, None), form)(x, scales)
    expected = x.astype(DTYPES[form])
    _assert_same_bits(quantized.values, expected)
    _assert_same_bits(dequantized, expected.astype(np.float32))
    _assert_same_bits(rounded, expected.astype(np.float32))
    np.testing.assert_array_equal(rounded[0, : len(numbers)], numbers)


@pytest.mark.parametrize("form", DTYPES)
def test_numbers_beyond_given_scales_become_the_largest(form: str) -> None:
    most = np.float32(LARGEST[form])
    x = np.array([[1.01, 1.1, 2.0, 1e6, 3e38], [-1.01, -1.1, -2.0, -1e6, -3e38]], np.float32)
    scales = np.array([[1.0], [1e-3]], np.float32)
    *_, rounded = _compiled((1, None), form)(most * np.clip(x, -1e33, 1e33), scales)
    expected = np.broadcast_to([[most], [-most * scales[1, 0]]], x.shape)
    np.testing.assert_array_equal(rounded, expected)
    # No number so large that it is infinite on the way.
    quantized, dequantized, rounded = _compiled((1, None), form)(x[:, -1:], scales)
    np.testing.assert_array_equal(quantized.values.astype(np.float32), [[most], [-most]])
    np.testing.assert_array_equal(dequantized, rounded)
    # And still none of what is no number.
    nothing = np.array([[np.inf, np.nan], [-np.inf, np.nan]], np.float32)
    for result in jax.tree.leaves(_compiled((1, None), form)(nothing, scales)[1:]):
        assert np.all(np.isnan(result))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_what_is_no_number_makes_its_tile_nan(tile: Tile, bad: float) -> None:
    x = np.random.default_rng(0).normal(size=(140, 300)).astype(np.float32)
    place = 131, 290
    x[place] = bad
    parts = [part for _, part in fp8_reference.places(x.shape, tile)]
    (hit,) = (p for p in parts if all(s.start <= i < s.stop for s, i in zip(p, place, strict=True)))
    expected = np.zeros(x.shape, bool)
    expected[hit] = True
    for form in DTYPES:
        for power_of_two in (False, True):
            rounded = _check(x, tile, form, power_of_two)
            np.testing.assert_array_equal(np.isnan(rounded), expected)


@pytest.mark.parametrize("form", DTYPES)
def test_zeros_stay_and_keep_their_signs(form: str) -> None:
    x = np.zeros((2, 300), np.float32)
    x[1] = -0.0
    for options in ({}, {"power_of_two": True}, {"least": 1e-4}):
        rounded = _check(x, (1, 128), form, **options)
        np.testing.assert_array_equal(np.signbit(rounded), np.signbit(x))
    quantized, *_ = _compiled((1, 128), form)(x)
    assert np.all(quantized.scales > 0)


def test_what_is_small_beside_its_tile_is_flushed_and_no_more() -> None:
    """E4M3 reaches from 2**-9 to 448."""
    x = np.array([[448, 2.0**-9, 2.0**-10, 2.0**-10 * 1.01, -(2.0**-10)]], np.float32)
    expected = np.array([[448, 2.0**-9, 0, 2.0**-9, -0.0]], np.float32)
    _assert_same_bits(_check(x, (1, 128), "e4m3"), expected)


def test_round_up_to_power_of_two() -> None:
    """Of every exponent: the power itself, its neighbours, and what lies between."""
    exponents = np.arange(-126, 128)
    powers = np.ldexp(np.float32(1), exponents)
    above, below = (np.nextafter(powers, np.float32(end)) for end in (np.inf, 0))
    between = powers * np.float32(1.5)
    largest = np.finfo(np.float32).max
    x = np.concatenate([powers, above, between, below[1:], [largest, np.inf, np.nan]])
    with np.errstate(over="ignore"):
        following = np.ldexp(np.float32(1), exponents + 1)  # the last is infinite
    expected = [powers, following, following, powers[1:], [np.inf, np.inf, np.nan]]
    got = quick_jit(fp8.round_up_to_power_of_two)(x)
    np.testing.assert_array_equal(got, np.concatenate(expected))


def test_what_rounds_to_2_to_the_128_is_infinite() -> None:
    """With scales of powers of two alone: others reach float32's largest number exactly."""
    edge = np.float32(248 * 2.0**120)  # halfway between 240 and 256 of these units
    x = np.array([[edge, -edge], [np.nextafter(edge, np.float32(np.inf)), -edge]], np.float32)
    most = np.float32(240 * 2.0**120)
    rounded = _compiled((1, 128), "e4m3", power_of_two=True)(x)[2]
    np.testing.assert_array_equal(rounded, [[np.inf, -np.inf], [np.inf, -np.inf]])
    below = np.nextafter(x[:1], np.float32(0))
    rounded = _compiled((1, 128), "e4m3", power_of_two=True)(below)[2]
    np.testing.assert_array_equal(rounded, [[most, -most]])
    largest = np.full((1, 2), np.finfo(np.float32).max)
    assert np.all(np.isfinite(_compiled((1, 128), "e4m3")(largest)[2]))


@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_quantising_by_powers_of_two_again_changes_nothing(tile: Tile, form: str) -> None:
    rng, again = np.random.default_rng(0), _compiled(tile, form, power_of_two=True)
    for spread in (0.1, 1.0, 8.0, 40.0):
        *_, once = again(_wide(rng, (200, 300), spread).astype(np.float32))
        *_, twice = again(once)
        _assert_same_bits(twice, once)


def _bits(dtype: Any) -> st.SearchStrategy[np.ndarray]:
    unsigned = f"u{np.dtype(dtype).itemsize}"
    return arrays(unsigned, (3, 7)).map(lambda x: x.view(dtype))


@given(
    x=_bits(np.float32) | _bits(ml_dtypes.bfloat16),
    tile=st.sampled_from([(1, 4), (2, 4), (None, None)]),
    form=st.sampled_from(list(DTYPES)),
    power_of_two=st.booleans(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_bits(x: np.ndarray, tile: Tile, form: str, power_of_two: bool) -> None:
    _check(x, tile, form, power_of_two)
