"""What attention keeps of the tokens so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.sharding import BATCH, BATCH_AXES, P

Entries = dict[str, jax.Array]  # by name, [batch, length, ...] each

STACKED = P(None, BATCH_AXES)  # the cache of a stack of layers: rows are split


class LayerCache(NamedTuple):
    """One layer's part of the cache of its stack, in which a token lies at its position.

    stacked: by name, [layers, batch, slots, ...] each.
    layer: [] int32.
    """

    stacked: Entries
    layer: jax.Array

    def write(self, entries: Entries, positions_BL: jax.Array) -> "LayerCache":
        """Puts tokens at their positions, [batch, length] int32; past the last slot, nowhere.

        XLA does it in place if nothing reads the former cache, so no step copies it.
        """

        def put(stacked, entries, layer, positions_BL):
            rows = jnp.arange(positions_BL.shape[0])[:, None]
            return jax.tree.map(
                lambda c, e: c.at[layer, rows, positions_BL].set(e.astype(c.dtype), mode="drop"),
                stacked,
                entries,
            )

        # Rows are written where they lie, whatever the mesh.
        put = jax.shard_map(put, in_specs=(STACKED, BATCH, P(), BATCH), out_specs=STACKED)
        return self._replace(stacked=put(self.stacked, entries, self.layer, positions_BL))

    def read(self) -> Entries:
        """[batch, slots, ...] each."""
        return jax.tree.map(
            lambda c: jax.lax.dynamic_index_in_dim(c, self.layer, keepdims=False), self.stacked
        )


def values_per_token(config: ModelConfig, speculative: bool = False) -> int:
    """Values that a token takes in all layers (DeepSeek-V2, table 1).

    With speculation, the module that drafts is one more layer.
    """
    attention = config.attention
    if attention.kind == "latent":
        one_layer = attention.kv_lora_rank + attention.qk_rope_head_dim
    else:
        one_layer = 2 * attention.num_key_value_heads * attention.head_dim
    return (config.num_hidden_layers + speculative) * one_layer


def of_heads(config: ModelConfig, heads: int, speculative: bool = False) -> int:
    """The same for keys and values of so many heads, not compressed."""
    attention = config.attention
    dim = attention.qk_nope_head_dim if attention.kind == "latent" else attention.head_dim
    return (config.num_hidden_layers + speculative) * 2 * heads * dim
