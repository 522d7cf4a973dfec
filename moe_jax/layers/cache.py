"""What attention keeps of the tokens so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
