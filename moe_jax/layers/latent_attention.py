"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, section 2.1.1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.linear import Linear, RMSNorm
from moe_jax.ops.attention import attention
from moe_jax.ops.rope import Rotary, apply_rotary

LATENT_EPS = 1e-6  # of the norms on the latents, whatever the model's own epsilon


class LatentAttention(nnx.Module):
    """Keys and values come from one small latent per token, and a rotary key shared by all heads.

    [batch, length, dim] to the same. Equations 1 to 11 of DeepSeek-V3; query compression is left
    out where `q_lora_rank` is None.
    """

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, *, rngs: nnx.Rngs):
        sizes, dim = config.attention, config.hidden_size
        self.sizes = sizes
        heads, nope, rope = sizes.num_heads, sizes.qk_nope_head_dim, sizes.qk_rope_head_dim
        shared: dict[str, Any] = dict(
            std=config.initializer_range, dtype=jnp.dtype(precision.compute_dtype), rngs=rngs
        )
        query_heads = (heads, nope + rope)
        if sizes.q_lora_rank is None:
            self.query = Linear((dim,), query_heads, ("embed", None, None), **shared)
        else:
            rank = sizes.q_lora_rank
            self.query_down = Linear((dim,), (rank,), ("embed", None), **shared)
            self.query_norm = RMSNorm(rank, LATENT_EPS)
            self.query_up = Linear((rank,), query_heads, ("latent", None, None), **shared)
        rank = sizes.kv_lora_rank
        self.kv_down = Linear((dim,), (rank + rope,), ("embed", None), **shared)
        self.kv_norm = RMSNorm(rank, LATENT_EPS)
        self.kv_up = Linear(
            (rank,), (heads, nope + sizes.v_head_dim), ("latent", None, None), **shared
        )
        self.output = Linear((heads, sizes.v_head_dim), (dim,), (None, None, "embed"), **shared)

    def __call__(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, rotary: Rotary, scale: float
    ) -> jax.Array:
        """`scale` multiplies the scores; it and `rotary` follow the curriculum's stage."""
        sizes = self.sizes
        if sizes.q_lora_rank is None:
            query = self.query(x_BLD)
        else:
            query = self.query_up(self.query_norm(self.query_down(x_BLD)))
        query_nope, query_rope = jnp.split(query, [sizes.qk_nope_head_dim], axis=-1)

        latent, key_rope = jnp.split(self.kv_down(x_BLD), [sizes.kv_lora_rank], axis=-1)
        key_value = self.kv_up(self.kv_norm(latent))
        key_nope, value = jnp.split(key_value, [sizes.qk_nope_head_dim], axis=-1)

        query_rope = apply_rotary(query_rope, rotary)
        key_rope = apply_rotary(key_rope[:, :, None], rotary)
        key_rope = jnp.broadcast_to(key_rope, (*key_nope.shape[:-1], sizes.qk_rope_head_dim))
        heads = attention(
            jnp.concatenate([query_nope, query_rope], axis=-1),
            jnp.concatenate([key_nope, key_rope], axis=-1),
            value,
            segment_ids_BL,
            scale,
        )
        return self.output(heads)
