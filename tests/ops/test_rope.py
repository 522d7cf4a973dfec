"""Rotary position embedding, against complex numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.rope import apply_rotary, rotary_angles

DIM, THETA = 6, 50.0


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
    rotary = rotary_angles(jnp.asarray(positions), DIM, THETA)
    chex.assert_shape(rotary, (2, 5, DIM // 2))
    chex.assert_trees_all_close(
        apply_rotary(jnp.asarray(x), rotary), _rotated(x, positions, THETA), atol=5e-5
    )


def test_pairs_are_neighbours() -> None:
    """What starts in one pair stays in it, and the first pair turns by one radian a position."""
    x = jnp.zeros((1, 1, 1, DIM)).at[..., 2].set(1.0)
    turned = apply_rotary(x, rotary_angles(jnp.ones((1, 1), jnp.int32), DIM, THETA))[0, 0, 0]
    angle = THETA ** (-2 / DIM)
    chex.assert_trees_all_close(
        turned, np.array([0, 0, np.cos(angle), np.sin(angle), 0, 0]), atol=1e-6
    )
    first = jnp.zeros((1, 1, 1, DIM)).at[..., 0].set(1.0)
    turned = apply_rotary(first, rotary_angles(jnp.ones((1, 1), jnp.int32), DIM, THETA))[0, 0, 0]
    chex.assert_trees_all_close(turned[:2], np.array([np.cos(1), np.sin(1)]), atol=1e-6)


def test_products_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, DIM)), jnp.float32) for _ in range(2))

    def product(query_position: int, key_position: int) -> jax.Array:
        def turned(x: jax.Array, position: int) -> jax.Array:
            return apply_rotary(x, rotary_angles(jnp.full((1, 1), position), DIM, THETA))

        return jnp.sum(turned(q, query_position) * turned(k, key_position))

    chex.assert_trees_all_close(product(7, 3), product(104, 100), atol=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_turns_in_float32_and_keeps_the_dtype(dtype: jnp.dtype) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, DIM)).astype(dtype)
    rotary = rotary_angles(jnp.arange(4)[None] * 100, DIM, THETA)
    turned = apply_rotary(x, rotary)
    chex.assert_type(rotary, jnp.float32)
    assert turned.dtype == dtype
    wide = apply_rotary(x.astype(jnp.float32), rotary)
    chex.assert_trees_all_equal(turned, wide.astype(dtype))
