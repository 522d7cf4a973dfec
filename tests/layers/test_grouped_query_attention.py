"""Grouped-query attention, against a loop over heads and positions in float64."""

import chex
import numpy as np
import pytest
from emulated import run_attention

from moe_jax.config import AttentionConfig, ModelConfig, RopeConfig
from moe_jax.layers.grouped_query_attention import GroupedQueryAttention

DIM, HEADS, HEAD_DIM, THETA, BATCH, LENGTH = 10, 4, 6, 30.0, 4, 5
SEGMENTS = np.array([[1] * 5, [1, 1, 2, 2, 2], [1, 1, 1, 0, 0], [0] * 5], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 1, 2, 0, 0], [0] * 5], np.int32)


def _rope(x: np.ndarray, position: int) -> np.ndarray:
    """Dims i and i + half as one complex number."""
    half = HEAD_DIM // 2
    turned = x[:half] + 1j * x[half:]
    turned = turned * np.exp(1j * position * THETA ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def _by_loops(weights: dict[str, np.ndarray], x: np.ndarray, groups: int) -> np.ndarray:
    result = np.zeros(x.shape)
    for b in range(BATCH):
        for t in range(LENGTH):
            for h in range(HEADS):
                g = h * groups // HEADS
                q = _rope(x[b, t] @ weights["query"][:, h], POSITIONS[b, t])
                seen = [m for m in range(t + 1) if SEGMENTS[b, m] == SEGMENTS[b, t]]
                keys = [_rope(x[b, m] @ weights["key"][:, g], POSITIONS[b, m]) for m in seen]
                shares = np.exp([q @ key / np.sqrt(HEAD_DIM) for key in keys])
                shares /= shares.sum()
                value = sum(
                    share * (x[b, m] @ weights["value"][:, g])
                    for share, m in zip(shares, seen, strict=True)
                )
                result[b, t] += value @ weights["output"][h]
    return result


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 2, "expert": 2}], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_a_loop(groups: int, sizes: dict[str, int]) -> None:
    config = ModelConfig(
        hidden_size=DIM,
        attention=AttentionConfig(
            kind="grouped_query", num_heads=HEADS, num_key_value_heads=groups, head_dim=HEAD_DIM
        ),
        rope=RopeConfig(theta=THETA, interleaved=False),
    )
    h, y, weights = run_attention(
        GroupedQueryAttention, config, sizes, SEGMENTS, POSITIONS, HEAD_DIM
    )
    expected = _by_loops(weights, h.astype(np.float64), groups)
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-4)
