"""Attention to a cache, against loops, and the absorbed form against keys and values made."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.cached_attention import (
    absorbed_attention,
    absorbed_attention_reference,
    grouped_query_attention,
)

BATCH, LENGTH, SLOTS, HEADS, SCALE = 3, 2, 6, 4, 0.37
POSITIONS = np.array([[0, 1], [3, 4], [4, 5]], np.int32)  # the first slot to the last


def _normal(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _with_noise_behind(cache: np.ndarray) -> np.ndarray:
    """Slots that no query sees hold what would win if it were seen."""
    behind = np.arange(SLOTS) > POSITIONS.max(axis=1)[:, None]
    assert behind.any()
    return np.where(behind.reshape(*behind.shape, *[1] * (cache.ndim - 2)), 1e4, cache)


def _by_loops(q, k, v) -> np.ndarray:
    result = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        group = h // (HEADS // k.shape[2])
        seen = range(POSITIONS[b, t] + 1)
        shares = np.exp([SCALE * np.dot(q[b, t, h], k[b, m, group]) for m in seen])
        for share, m in zip(shares / shares.sum(), seen, strict=True):
            result[b, t, h] += share * v[b, m, group]
    return result


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries_equal_loops(groups: int) -> None:
    q, k, v = _normal(
        (BATCH, LENGTH, HEADS, 6), (BATCH, SLOTS, groups, 6), (BATCH, SLOTS, groups, 5)
    )
    noisy = _with_noise_behind(k), _with_noise_behind(v)
    result = grouped_query_attention(jnp.asarray(q), *noisy, jnp.asarray(POSITIONS), SCALE)
    chex.assert_trees_all_close(result, _by_loops(q, k, v), atol=1e-5)


def _latent_inputs() -> list[np.ndarray]:
    return _normal(
        (BATCH, LENGTH, HEADS, 6),
        (BATCH, LENGTH, HEADS, 4),
        (BATCH, SLOTS, 7),
        (BATCH, SLOTS, 4),
        (7, HEADS, 6),
        (7, HEADS, 5),
        seed=1,
    )


def test_absorbed_projections_give_what_keys_and_values_give() -> None:
    q_nope, q_rope, latent, k_rope, *up = _latent_inputs()
    result = absorbed_attention(
        *(jnp.asarray(q_nope), jnp.asarray(q_rope)),
        *(_with_noise_behind(latent), _with_noise_behind(k_rope)),
        *map(jnp.asarray, up),
        jnp.asarray(POSITIONS),
        SCALE,
    )
    inputs = map(jnp.asarray, (q_nope, q_rope, latent, k_rope, *up))
    expected = absorbed_attention_reference(*inputs, jnp.asarray(POSITIONS), SCALE)
    chex.assert_trees_all_close(result, expected, atol=1e-4)


def test_bfloat16_is_close_and_keeps_its_dtype() -> None:
    wide = [jnp.asarray(x) for x in _latent_inputs()]
    narrow = [x.astype(jnp.bfloat16) for x in wide]
    result = absorbed_attention(*narrow, jnp.asarray(POSITIONS), SCALE)
    assert result.dtype == jnp.bfloat16
    expected = absorbed_attention_reference(*wide, jnp.asarray(POSITIONS), SCALE)
    error = jnp.linalg.norm(result.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error < 0.02  # 2^-8 is bfloat16's rounding; a handful of them stand in a row
