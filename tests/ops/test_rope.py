"""Rotary position embedding, against complex numbers."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import RopeConfig
from moe_jax.ops.rope import apply_rotary, frequencies, rotary_angles, score_correction

DIM, THETA = 6, 50.0
ROPE = RopeConfig(theta=THETA)


def _rotated(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Each interleaved pair as one complex number, times exp(i * position * frequency)."""
    result = np.zeros(x.shape)
    batch, length, heads, dim = x.shape
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                for i in range(dim // 2):
                    angle = float(positions[b, t]) * theta ** (-2 * i / dim)
                    turned = complex(*x[b, t, h, 2 * i : 2 * i + 2]) * np.exp(1j * angle)
                    result[b, t, h, 2 * i : 2 * i + 2] = turned.real, turned.imag
    return result


def test_equals_complex_rotation() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, DIM)).astype(np.float32)
    positions = rng.integers(0, 200, (2, 5)).astype(np.int32)
    rotary = rotary_angles(jnp.asarray(positions), DIM, ROPE)
    chex.assert_shape(rotary, (2, 5, DIM // 2))
    chex.assert_trees_all_close(
        apply_rotary(jnp.asarray(x), rotary, True), _rotated(x, positions, THETA), atol=5e-5
    )


def test_pairs_are_neighbours() -> None:
    """What starts in one pair stays in it, and the first pair turns by one radian a position."""
    x = jnp.zeros((1, 1, 1, DIM)).at[..., 2].set(1.0)
    turned = apply_rotary(x, rotary_angles(jnp.ones((1, 1), jnp.int32), DIM, ROPE), True)[0, 0, 0]
    angle = THETA ** (-2 / DIM)
    chex.assert_trees_all_close(
        turned, np.array([0, 0, np.cos(angle), np.sin(angle), 0, 0]), atol=1e-6
    )
    first = jnp.zeros((1, 1, 1, DIM)).at[..., 0].set(1.0)
    turned = apply_rotary(first, rotary_angles(jnp.ones((1, 1), jnp.int32), DIM, ROPE), True)[
        0, 0, 0
    ]
    chex.assert_trees_all_close(turned[:2], np.array([np.cos(1), np.sin(1)]), atol=1e-6)


def test_products_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, DIM)), jnp.float32) for _ in range(2))

    def product(query_position: int, key_position: int) -> jax.Array:
        def turned(x: jax.Array, position: int) -> jax.Array:
            return apply_rotary(x, rotary_angles(jnp.full((1, 1), position), DIM, ROPE), True)

        return jnp.sum(turned(q, query_position) * turned(k, key_position))

    chex.assert_trees_all_close(product(7, 3), product(104, 100), atol=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_turns_in_float32_and_keeps_the_dtype(dtype: jnp.dtype) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, DIM)).astype(dtype)
    rotary = rotary_angles(jnp.arange(4)[None] * 100, DIM, ROPE)
    turned = apply_rotary(x, rotary, True)
    chex.assert_type(rotary, jnp.float32)
    assert turned.dtype == dtype
    wide = apply_rotary(x.astype(jnp.float32), rotary, True)
    chex.assert_trees_all_equal(turned, wide.astype(dtype))


def test_half_split_pairs_are_dims_half_the_width_apart() -> None:
    x = np.random.default_rng(2).normal(size=(2, 3, 2, DIM)).astype(np.float32)
    positions = np.arange(6, dtype=np.int32).reshape(2, 3)
    rotary = rotary_angles(jnp.asarray(positions), DIM, ROPE)
    angles = positions[..., None] * THETA ** (-2 * np.arange(3) / DIM)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[:, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    chex.assert_trees_all_close(apply_rotary(jnp.asarray(x), rotary, False), expected, atol=1e-6)


def _yarn(dim: int, config: RopeConfig) -> list[float]:
    """Peng et al. 2023, section 3.2, one pair at a time."""
    result = []
    for i in range(dim // 2):
        plain = config.theta ** (-2 * i / dim)
        borders = []
        for turns in (config.beta_fast, config.beta_slow):
            length = config.original_max_position_embeddings / (2 * math.pi * turns)
            borders.append(dim / 2 * math.log(length, config.theta))
        low, high = borders
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 * (low == high)
        kept = 1 - min(max((i - low) / (high - low), 0), 1)
        result.append(plain * kept + plain / config.factor * (1 - kept))
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"truncate": False},
        {"factor": 1.0},
        {"beta_fast": 4.0, "beta_slow": 2.0},
        {"original_max_position_embeddings": 8},
        {"original_max_position_embeddings": 6},  # both borders at 0: a ramp without width
    ],
    ids=str,
)
def test_yarn_frequencies(changes: dict) -> None:
    fields = dict(theta=1e4, factor=40.0, original_max_position_embeddings=4096)
    config = RopeConfig(scaling="yarn", **(fields | changes))
    chex.assert_trees_all_close(frequencies(64, config), np.array(_yarn(64, config)), rtol=1e-5)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_what_turns_often_and_divides_what_hardly_turns(truncate: bool) -> None:
    config = RopeConfig(scaling="yarn", factor=40.0, truncate=truncate)
    plain = frequencies(64, RopeConfig())
    turns = plain * 4096 / (2 * math.pi)
    ratio = plain / frequencies(64, config)
    # Whole dims at the borders widen the ramp by less than one dim to each side.
    often, hardly = turns > 32 * 1.34, turns < 1 / 1.34
    assert often.any() and hardly.any()
    chex.assert_trees_all_close(ratio[often], np.ones(often.sum()), rtol=1e-6)
    chex.assert_trees_all_close(ratio[hardly], np.full(hardly.sum(), 40.0), rtol=1e-5)
    between = ratio[~often & ~hardly]
    assert np.all(np.diff(between) > 0) and 1 < between[len(between) // 2] < 40


def test_a_ramp_without_width_is_a_step() -> None:
    config = RopeConfig(scaling="yarn", factor=2.0, original_max_position_embeddings=6)
    ratio = frequencies(8, RopeConfig()) / frequencies(8, config)
    chex.assert_trees_all_close(ratio, np.array([1.0, 2.0, 2.0, 2.0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "factor", "correction"),
    [
        ({}, 0.1 * math.log(40) + 1, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, (0.1 * math.log(40) + 1) ** 2),
        (
            {"mscale": 2.0, "mscale_all_dim": 0.5},
            (0.2 * math.log(40) + 1) / (0.05 * math.log(40) + 1),
            (0.05 * math.log(40) + 1) ** 2,
        ),
        ({"attention_factor": 1.7, "mscale_all_dim": 1.0}, 1.7, (0.1 * math.log(40) + 1) ** 2),
        ({"factor": 1.0}, 1.0, 1.0),
    ],
    ids=str,
)
def test_yarn_scales_angles_and_scores(changes: dict, factor: float, correction: float) -> None:
    config = RopeConfig(scaling="yarn", **({"factor": 40.0} | changes))
    rotary = rotary_angles(jnp.zeros((1, 1), jnp.int32), DIM, config)
    chex.assert_trees_all_close(rotary.cos, np.full((1, 1, DIM // 2), factor), rtol=1e-6)
    later = rotary_angles(jnp.full((1, 1), 3, jnp.int32), DIM, config)
    lengths = later.cos**2 + later.sin**2
    chex.assert_trees_all_close(lengths, np.full((1, 1, DIM // 2), factor**2), rtol=1e-5)
    assert score_correction(config) == pytest.approx(correction)
    assert score_correction(dataclasses.replace(config, scaling="none")) == 1.0


def test_llama3_frequencies() -> None:
    """Long waves are stretched, short ones are not, between them it is a mean of the two."""
    config = RopeConfig(
        theta=5e5, scaling="llama3", factor=8.0, original_max_position_embeddings=8192
    )
    for i, found in enumerate(frequencies(128, config)):
        plain = 5e5 ** (-2 * i / 128)
        wave = 2 * math.pi / plain
        if wave < 8192 / 4:
            expected = plain
        elif wave > 8192 / 1:
            expected = plain / 8
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert found == pytest.approx(expected, rel=1e-5)
