"""The cache of generated text: what it holds, and how many bytes that is."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import sharding
from moe_jax.config import ModelConfig
from moe_jax.layers.cache import of_heads, values_per_token
from moe_jax.models.decoder import Cache


def with_slots(entries: Cache, slots: int) -> Cache:
    """A cache [layers, batch, slots, ...] that begins with the entries of prompts."""

    def fill(e: jax.Array) -> jax.Array:
        return jnp.pad(e, [(0, 0), (0, 0), (0, slots - e.shape[2])] + [(0, 0)] * (e.ndim - 3))

    return jax.tree.map(fill, entries)


def describe(
    config: ModelConfig, slots: int, prompts: int, mesh: Mesh, dtype: Any, speculative: bool = False
) -> list[str]:
    """The cache's size for a person, beside that of other kinds of attention."""
    itemsize = jnp.dtype(dtype).itemsize
    mine, heads = values_per_token(config, speculative), config.attention.num_heads
    rows = prompts + -prompts % sharding.num_shards(dict(mesh.shape), sharding.BATCH_AXES)
    total = mine * itemsize * slots * rows
    size = f"{total / 2**20:,.1f} MiB" if total >= 2**20 else f"{total / 2**10:,.1f} KiB"
    of = f"{rows} row{'s' * (rows > 1)} of {slots:,}"
    lines = [f"cache       {mine * itemsize:,} bytes per token; {size} for {of}"]
    for name, count in ((f"all {heads} heads", heads), ("8 groups of heads", 8)):
        other = of_heads(config, count, speculative)
        if count <= heads and other != mine:
            size = f"{other * itemsize:,} bytes, {other / mine:.1f}x"
            lines.append(f"            {size}, with keys and values of {name}")
    return lines
