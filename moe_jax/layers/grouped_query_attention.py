"""Grouped-query attention (Ainslie et al. 2023), as in Llama and Mixtral."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.cache import Entries, LayerCache
from moe_jax.layers.linear import Initializer, Linear, product_of
from moe_jax.ops.attention import attention
from moe_jax.ops.backends import choose
from moe_jax.ops.cached_attention import grouped_query_attention
from moe_jax.ops.rope import Rotary, apply_rotary


class GroupedQueryAttention(nnx.Module):
    """Neighbouring query heads share a head of keys and values: [batch, length, dim] to the same.

    With as many key/value heads as query heads it is plain multi-head attention.
    """

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, *, rngs: nnx.Rngs):
        sizes, dim = config.attention, config.hidden_size
        self.model, self.sizes, self.rope = config, sizes, config.rope
        shared: dict[str, Any] = dict(
            initializer=Initializer.of(config),
            dtype=jnp.dtype(precision.compute_dtype),
            product=product_of(precision, "attention"),
            rngs=rngs,
        )
        heads, groups = sizes.num_heads, sizes.num_key_value_heads
        into, out = ("embed", "wide", None), ("wide", None, "embed")
        self.query = Linear((dim,), (heads, sizes.head_dim), into, **shared)
        self.key = Linear((dim,), (groups, sizes.head_dim), into, **shared)
        self.value = Linear((dim,), (groups, sizes.head_dim), into, **shared)
        self.output = Linear((heads, sizes.head_dim), (dim,), out, **shared)

    @property
    def scale(self) -> float:
        """The factor on attention scores."""
        return self.sizes.head_dim**-0.5

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array, rotary: Rotary) -> jax.Array:
        return self.prefill(x_BLD, segment_ids_BL, rotary)[0]

    def prefill(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, rotary: Rotary
    ) -> tuple[jax.Array, Entries]:
        """The same, and what a cache keeps of each token."""
        query, entries = self._query(x_BLD, rotary), self._entries(x_BLD, rotary)
        form = choose(self.model, query.dtype).attention
        heads = attention(query, entries["key"], entries["value"], segment_ids_BL, self.scale, form)
        return self.output(heads), entries

    def decode(
        self, x_BLD: jax.Array, cache: LayerCache, positions_BL: jax.Array, rotary: Rotary
    ) -> tuple[jax.Array, LayerCache]:
        """Attention of new tokens to all tokens up to them.

        Args:
          cache: what it has of the tokens before.
          positions_BL: [batch, length] int32, of the new tokens.
        Returns:
          [batch, length, dim]; the cache with the new tokens.
        """
        cache = cache.write(self._entries(x_BLD, rotary), positions_BL)
        query, entries = self._query(x_BLD, rotary), cache.read()
        heads = grouped_query_attention(
            query, entries["key"], entries["value"], positions_BL, self.scale
        )
        return self.output(heads), cache

    def _query(self, x_BLD: jax.Array, rotary: Rotary) -> jax.Array:
        return apply_rotary(self.query(x_BLD), rotary, self.rope.interleaved)

    def _entries(self, x_BLD: jax.Array, rotary: Rotary) -> Entries:
        """{"key", "value"}: [batch, length, key/value heads, dim] each."""
        key = apply_rotary(self.key(x_BLD), rotary, self.rope.interleaved)
        return {"key": key, "value": self.value(x_BLD)}
