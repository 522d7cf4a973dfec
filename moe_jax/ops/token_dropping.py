"""Which choices of experts exceed a capacity and are dropped in training.

All of it runs inside a `shard_map` region, on one device's rows. A capacity is shared by the tokens
of a group of rows, however these are spread over devices, so what is dropped depends on the batch
and the config alone.

Shapes: R rows of this device, L length, K chosen experts per token, G groups, C choices of a group.
"""

import math

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig


def kept_choices(
    expert_ids_RLK: jax.Array, scores_RLK: jax.Array, config: MoEConfig, axes: tuple[str, ...]
) -> jax.Array:
    """False for the choices that are dropped: [rows, length, top_k] bool.

    "expert" (Switch Transformer, section 2.2): an expert serves first choices before second ones,
    and earlier tokens before later ones. "device" (DeepSeek-V2, section 2.2.4): a device group
    serves high scores before low ones, and before them some rows, of which nothing is ever dropped.
    A capacity is `capacity_factor` times the group's choices over the number of experts, or of
    device groups; positions of padding count in it.

    Args:
      expert_ids_RLK: [rows, length, top_k] int32; `num_experts` stands for "nowhere".
      scores_RLK: [rows, length, top_k] float32, of the choices.
      axes: mesh axes that the micro-batch's rows are split over.
    """
    rows, length, top_k = expert_ids_RLK.shape
    scores_RLK = jax.lax.stop_gradient(scores_RLK)
    devices = jax.lax.axis_size(axes)
    first_row = jax.lax.axis_index(axes) * rows
    group_rows = config.capacity_group or rows * devices
    choices = group_rows * length * top_k
    spread = rows % group_rows != 0
    if spread:  # a group lies on several devices: all of them look at all choices
        expert_ids_RLK, scores_RLK = (
            jax.lax.all_gather(x, axes, axis=0, tiled=True) for x in (expert_ids_RLK, scores_RLK)
        )
    row_R = jnp.arange(expert_ids_RLK.shape[0]) + (0 if spread else first_row)
    exempt_R = jnp.zeros(row_R.shape, jnp.bool)
    if config.token_dropping == "device":
        buckets, share = config.num_device_groups, config.undropped_sequences
        # Evenly spread over the micro-batch, the first row among them.
        exempt_R = jnp.floor(row_R * share) != jnp.floor((row_R - 1) * share)
        order_RLK = jnp.where(exempt_R[:, None, None], -jnp.inf, -scores_RLK)
    else:
        assert config.token_dropping == "expert", config.token_dropping
        buckets = config.num_experts
        place_GLK = jnp.arange(choices).reshape(top_k, group_rows, length).transpose(1, 2, 0)
        order_RLK = place_GLK[row_R % group_rows]
    bucket_RLK = expert_ids_RLK * buckets // config.num_experts
    capacity = math.ceil(config.capacity_factor * choices / buckets)
    rank_GC = _rank(bucket_RLK.reshape(-1, choices), order_RLK.reshape(-1, choices))
    kept_RLK = (rank_GC < capacity).reshape(expert_ids_RLK.shape) | exempt_R[:, None, None]
    return jax.lax.dynamic_slice_in_dim(kept_RLK, first_row, rows) if spread else kept_RLK


def _rank(bucket_GC: jax.Array, order_GC: jax.Array) -> jax.Array:
    """The place of each choice in its bucket, from 0: [groups, choices] int32."""
    index_GC = jnp.broadcast_to(jnp.arange(bucket_GC.shape[1], dtype=jnp.int32), bucket_GC.shape)
    index_GC = index_GC + jnp.zeros_like(bucket_GC)  # varies over the mesh as the buckets do
    sorted_bucket, _, sorted_index = jax.lax.sort(
        (bucket_GC, order_GC, index_GC), dimension=1, num_keys=2
    )
    is_first = jnp.diff(sorted_bucket, axis=1, prepend=-1) != 0
    start = jax.lax.cummax(jnp.where(is_first, index_GC, 0), axis=1)
    return jax.vmap(lambda rank, at: jnp.zeros_like(rank).at[at].set(rank, unique_indices=True))(
        index_GC - start, sorted_index
    )
