"""A micro-batch as two halves, of which one computes while the other's tokens travel.

Each device's rows are cut in two. The halves need nothing of each other, so that the compiler may
set one half's attention between the start and the end of the other's exchange.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.layers.moe import RoutingStats
from moe_jax.models.block import Block, Context
from moe_jax.sharding import BATCH

Halves = tuple[jax.Array, jax.Array]


def split(tree: Any) -> tuple[Any, Any]:
    """Two trees of [batch / 2, ...], of a tree of [batch, ...] arrays split over the mesh."""

    def cut(tree):
        middle = len(jax.tree.leaves(tree)[0]) // 2
        return (
            jax.tree.map(lambda x: x[:middle], tree),
            jax.tree.map(lambda x: x[middle:], tree),
        )

    return jax.shard_map(cut, in_specs=BATCH, out_specs=BATCH)(tree)


def join(halves: Halves) -> jax.Array:
    """[batch, ...] of what `split` cut."""
    return jax.shard_map(
        lambda *parts: jnp.concatenate(parts), in_specs=(BATCH, BATCH), out_specs=BATCH
    )(*halves)


def split_context(context: Context) -> tuple[Context, Context]:
    arrays = context._replace(training=None)
    first, second = split(arrays)
    return first._replace(training=context.training), second._replace(training=context.training)


def apply(
    block: Block, halves: Halves, contexts: tuple[Context, Context]
) -> tuple[Halves, RoutingStats]:
    """The block on each half; what it reports of both together."""
    (x, of_first), (y, of_second) = map(block, halves, contexts)
    assert of_first is not None and of_second is not None
    sums = jax.tree.map(jnp.add, of_first, of_second)
    return (x, y), sums._replace(rounds=jnp.maximum(of_first.rounds, of_second.rounds))
