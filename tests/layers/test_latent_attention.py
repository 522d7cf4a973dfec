"""Multi-head latent attention, against the equations of DeepSeek-V3, section 2.1.1."""

import chex
import numpy as np
import pytest
from emulated import run_attention

from moe_jax.config import AttentionConfig, ModelConfig, RopeConfig
from moe_jax.layers.latent_attention import LatentAttention

DIM, HEADS, KV_RANK, NOPE, ROPE, V, THETA = 12, 3, 8, 6, 4, 5, 30.0
BATCH, LENGTH = 4, 6
SEGMENTS = np.array([[1] * 6, [1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0], [0] * 6], np.int32)
POSITIONS = np.array(
    [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0], [0] * 6], np.int32
)


# YaRN with borders behind the last pair, so that no frequency changes: what turns is scaled by
# mscale's ratio, and scores by the square of (0.1 * 0.7 * ln(8) + 1).
YARN = RopeConfig(
    theta=THETA,
    interleaved=False,
    scaling="yarn",
    factor=8.0,
    beta_fast=20.0,
    beta_slow=4.0,
    mscale=0.3,
    mscale_all_dim=0.7,
)
ROPES = {"plain": RopeConfig(theta=THETA), "yarn": YARN}


def _rope(x: np.ndarray, position: int, rope: RopeConfig) -> np.ndarray:
    """[rotary dim]: pairs as complex numbers."""
    turns = np.exp(1j * position * THETA ** (-np.arange(0, ROPE, 2) / ROPE))
    if rope is YARN:
        turned = (x[: ROPE // 2] + 1j * x[ROPE // 2 :]) * turns
        turned *= (0.03 * np.log(8) + 1) / (0.07 * np.log(8) + 1)
        return np.concatenate([turned.real, turned.imag])
    turned = (x[0::2] + 1j * x[1::2]) * turns
    return np.stack([turned.real, turned.imag], axis=1).reshape(-1)


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + 1e-6) * scale


def _by_equations(weights: dict[str, np.ndarray], h: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Equations 1 to 11, one token at a time, with the norms that the report adds on latents."""
    result = np.zeros(h.shape)
    scale = (NOPE + ROPE) ** -0.5
    if rope is YARN:
        scale *= (0.07 * np.log(8) + 1) ** 2
    for b in range(BATCH):
        keys, values, queries = [], [], []
        for t in range(LENGTH):
            position = int(POSITIONS[b, t])
            down = h[b, t] @ weights["kv_down"]
            c_kv = _norm(down[:KV_RANK], weights["kv_norm"])  # (1)
            k_rope = _rope(down[KV_RANK:], position, rope)  # (3)
            up = np.einsum("r,rhk->hk", c_kv, weights["kv_up"])
            k_c, v_c = up[:, :NOPE], up[:, NOPE:]  # (2), (5)
            keys.append([np.concatenate([k_c[i], k_rope]) for i in range(HEADS)])  # (4)
            values.append(v_c)
            if "query" in weights:
                q = np.einsum("d,dhk->hk", h[b, t], weights["query"])
            else:
                c_q = _norm(h[b, t] @ weights["query_down"], weights["query_norm"])  # (6)
                q = np.einsum("r,rhk->hk", c_q, weights["query_up"])  # (7)
            queries.append(
                [
                    np.concatenate([q[i, :NOPE], _rope(q[i, NOPE:], position, rope)])
                    for i in range(HEADS)
                ]
            )  # (8), (9)
        for t in range(LENGTH):
            seen = [j for j in range(t + 1) if SEGMENTS[b, j] == SEGMENTS[b, t]]
            for i in range(HEADS):
                scores = [queries[t][i] @ keys[j][i] * scale for j in seen]
                shares = np.exp(scores) / np.sum(np.exp(scores))
                o = sum(share * values[j][i] for share, j in zip(shares, seen, strict=True))  # (10)
                result[b, t] += o @ weights["output"][i]  # (11)
    return result


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 2, "expert": 2}], ids=str)
@pytest.mark.parametrize(("q_lora_rank", "rope"), [(None, "plain"), (10, "plain"), (10, "yarn")])
def test_equals_the_equations(q_lora_rank: int | None, rope: str, sizes: dict[str, int]) -> None:
    config = ModelConfig(
        hidden_size=DIM,
        rms_norm_eps=0.5,  # of the stream, and not of the latents
        attention=AttentionConfig(
            num_heads=HEADS,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=KV_RANK,
            qk_nope_head_dim=NOPE,
            qk_rope_head_dim=ROPE,
            v_head_dim=V,
        ),
        rope=ROPES[rope],
    )
    h, y, weights = run_attention(LatentAttention, config, sizes, SEGMENTS, POSITIONS, ROPE)
    expected_names = {"kv_down", "kv_norm", "kv_up", "output"}
    expected_names |= {"query"} if q_lora_rank is None else {"query_down", "query_norm", "query_up"}
    assert set(weights) == expected_names
    chex.assert_trees_all_close(y, _by_equations(weights, h, config.rope), rtol=1e-4, atol=1e-4)
