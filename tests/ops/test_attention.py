"""Attention within documents, against loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.attention import attention

# Two query heads share a head of keys and values; two head dims that differ.
BATCH, LENGTH, HEADS, GROUPS, QK, V = 2, 7, 4, 2, 6, 5
SCALE = 0.37
SEGMENTS = {
    "one document": [[1] * 7, [1] * 7],
    "packed": [[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 3, 3, 3, 3]],
    "padded": [[1, 1, 1, 1, 0, 0, 0], [0] * 7],
}


def _inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    sizes = [(HEADS, QK), (GROUPS, QK), (GROUPS, V)]
    return tuple(rng.normal(size=(BATCH, LENGTH, *size)).astype(np.float32) for size in sizes)


def _by_loops(q, k, v, segments, scale) -> np.ndarray:
    result = np.zeros((*q.shape[:3], V))
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = [m for m in range(t + 1) if segments[b, m] == segments[b, t]]
        g = h // 2
        exponentials = np.array([np.exp(scale * np.dot(q[b, t, h], k[b, m, g])) for m in seen])
        for weight, m in zip(exponentials / exponentials.sum(), seen, strict=True):
            result[b, t, h] += weight * v[b, m, g]
    return result


def _naive(q, k, v, segments, scale) -> jax.Array:
    """One query at a time over the keys that it sees, for gradients."""
    rows = []
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = np.array([m for m in range(t + 1) if segments[b, m] == segments[b, t]])
        exponentials = jnp.exp(scale * (k[b, seen, h // 2] @ q[b, t, h]))
        rows.append(exponentials @ v[b, seen, h // 2] / jnp.sum(exponentials))
    return jnp.stack(rows).reshape(*q.shape[:3], V)


@pytest.mark.parametrize("name", SEGMENTS)
def test_forward_equals_loops(name: str) -> None:
    q, k, v = _inputs()
    segments = np.array(SEGMENTS[name], np.int32)
    result = attention(q, k, v, jnp.asarray(segments), SCALE)
    chex.assert_trees_all_close(result, _by_loops(q, k, v, segments, SCALE), atol=1e-5)


def test_gradients_equal_those_of_loops() -> None:
    q, k, v = _inputs(1)
    segments = np.array([SEGMENTS["packed"][0], SEGMENTS["padded"][0]], np.int32)
    direction = np.random.default_rng(2).normal(size=(*q.shape[:3], V)).astype(np.float32)

    def gradients(function):
        loss = lambda q, k, v: jnp.sum(function(q, k, v, segments, SCALE) * direction)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    chex.assert_trees_all_close(gradients(attention), gradients(_naive), atol=1e-5)


def test_large_scores_stay_finite() -> None:
    q, k, v = _inputs(3)
    segments = jnp.ones((BATCH, LENGTH), jnp.int32)
    result, gradient = jax.value_and_grad(lambda q: jnp.sum(attention(q, k, v, segments, 1e4)))(q)
    chex.assert_tree_all_finite((result, gradient))


def test_bfloat16_is_close_and_keeps_its_dtype() -> None:
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in _inputs(4)]
    segments = np.array(SEGMENTS["packed"], np.int32)
    result = attention(*narrow, jnp.asarray(segments), SCALE)
    assert result.dtype == jnp.bfloat16
    expected = _by_loops(*(np.asarray(x, np.float64) for x in narrow), segments, SCALE)
    # 2^-8 is bfloat16's rounding; weights and result are rounded once each.
    chex.assert_trees_all_close(result.astype(jnp.float32), expected, atol=2e-2, rtol=2e-2)
