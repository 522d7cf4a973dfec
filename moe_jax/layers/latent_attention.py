"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, section 2.1.1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import sharding
from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.cache import Entries, LayerCache
from moe_jax.layers.linear import Initializer, Linear, RMSNorm, product_of
from moe_jax.ops.attention import attention
from moe_jax.ops.backends import choose
from moe_jax.ops.cached_attention import absorbed_attention
from moe_jax.ops.rope import Rotary, apply_rotary, score_correction

LATENT_EPS = 1e-6  # of the norms on the latents, whatever the model's own epsilon


class LatentAttention(nnx.Module):
    """Keys and values come from one small latent per token, and a rotary key shared by all heads.

    [batch, length, dim] to the same. Equations 1 to 11 of DeepSeek-V3; query compression is left
    out where `q_lora_rank` is None.
    """

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, *, rngs: nnx.Rngs):
        sizes, dim = config.attention, config.hidden_size
        self.model, self.sizes, self.rope = config, sizes, config.rope
        heads, nope, rope = sizes.num_heads, sizes.qk_nope_head_dim, sizes.qk_rope_head_dim
        shared: dict[str, Any] = dict(
            initializer=Initializer.of(config),
            dtype=jnp.dtype(precision.compute_dtype),
            product=product_of(precision, "attention"),
            rngs=rngs,
        )
        query_heads = (heads, nope + rope)
        if sizes.q_lora_rank is None:
            self.query = Linear((dim,), query_heads, ("embed", "wide", None), **shared)
        else:
            rank = sizes.q_lora_rank
            self.query_down = Linear((dim,), (rank,), ("embed", "wide"), **shared)
            self.query_norm = RMSNorm(rank, LATENT_EPS)
            self.query_up = Linear((rank,), query_heads, ("latent", "wide", None), **shared)
        rank = sizes.kv_lora_rank
        self.kv_down = Linear((dim,), (rank + rope,), ("embed", "wide"), **shared)
        self.kv_norm = RMSNorm(rank, LATENT_EPS)
        self.kv_up = Linear(
            (rank,), (heads, nope + sizes.v_head_dim), ("latent", "wide", None), **shared
        )
        self.output = Linear((heads, sizes.v_head_dim), (dim,), ("wide", None, "embed"), **shared)

    @property
    def scale(self) -> float:
        """The factor on attention scores, YaRN's correction with it."""
        dim = self.sizes.qk_nope_head_dim + self.sizes.qk_rope_head_dim
        return dim**-0.5 * score_correction(self.rope)

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array, rotary: Rotary) -> jax.Array:
        return self.prefill(x_BLD, segment_ids_BL, rotary)[0]

    def prefill(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, rotary: Rotary
    ) -> tuple[jax.Array, Entries]:
        """The same, and what a cache keeps of each token."""
        sizes = self.sizes
        entries = self._entries(x_BLD, rotary)
        key_nope, value = jnp.split(
            self.kv_up(entries["latent"]), [sizes.qk_nope_head_dim], axis=-1
        )
        key_rope = entries["key_rope"][:, :, None]
        key_rope = jnp.broadcast_to(key_rope, (*key_nope.shape[:-1], sizes.qk_rope_head_dim))
        heads = attention(
            jnp.concatenate(self._queries(x_BLD, rotary), axis=-1),
            jnp.concatenate([key_nope, key_rope], axis=-1),
            value,
            segment_ids_BL,
            self.scale,
            choose(self.model, value.dtype).attention,
        )
        return self.output(heads), entries

    def decode(
        self, x_BLD: jax.Array, cache: LayerCache, positions_BL: jax.Array, rotary: Rotary
    ) -> tuple[jax.Array, LayerCache]:
        """Attention of new tokens to all tokens up to them, by the absorbed projections.

        Args:
          cache: what it has of the tokens before.
          positions_BL: [batch, length] int32, of the new tokens.
        Returns:
          [batch, length, dim]; the cache with the new tokens.
        """
        cache = cache.write(self._entries(x_BLD, rotary), positions_BL)
        entries = cache.read()
        up = sharding.gather(self.kv_up.weight[...].astype(self.kv_up.dtype))
        up_key, up_value = jnp.split(up, [self.sizes.qk_nope_head_dim], axis=-1)
        heads = absorbed_attention(
            *self._queries(x_BLD, rotary),
            entries["latent"],
            entries["key_rope"],
            up_key,
            up_value,
            positions_BL,
            self.scale,
        )
        return self.output(heads), cache

    def _entries(self, x_BLD: jax.Array, rotary: Rotary) -> Entries:
        """Of each token its latent, normed, and the rotary key that all heads share.

        {"latent": [batch, length, kv_lora_rank], "key_rope": [batch, length, qk_rope_head_dim]}.
        """
        latent = checkpoint_name(self.kv_down(x_BLD), "latent")
        latent, key_rope = jnp.split(latent, [self.sizes.kv_lora_rank], axis=-1)
        key_rope = apply_rotary(key_rope[:, :, None], rotary, self.rope.interleaved)
        return {"latent": self.kv_norm(latent), "key_rope": key_rope[:, :, 0]}

    def _queries(self, x_BLD: jax.Array, rotary: Rotary) -> tuple[jax.Array, jax.Array]:
        """The parts of each head without and with rotation."""
        if self.sizes.q_lora_rank is None:
            query = self.query(x_BLD)
        else:
            latent = checkpoint_name(self.query_down(x_BLD), "latent")
            query = self.query_up(self.query_norm(latent))
        nope, rope = jnp.split(query, [self.sizes.qk_nope_head_dim], axis=-1)
        return nope, apply_rotary(rope, rotary, self.rope.interleaved)
