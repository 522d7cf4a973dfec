"""What the kernels of attention share: rows of whole blocks, and a gradient of their own.

A query block needs a range of key blocks, and a key block one of query blocks, as causality and
documents have it. Kernels compute these alone.

Shapes: B batch, L length in whole blocks, N blocks of a row, m positions of a block, H query heads,
G key/value heads, Q query/key head dim, V value head dim.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

LOWEST = -1e30  # stands for -inf where a difference of two would be no number


class Kernels(NamedTuple):
    """Attention on one kind of machine.

    block_of: q_BLHQ, v_BLGV -> the positions of a block, which need not divide the length.
    forward: q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL, scale, block -> values_BLHV in v's dtype and
      log_normalizers_BHL float32, the logarithm of each query's sum of exponentials.
    backward: the same six, log_normalizers_BHL, deltas_BHL float32 (the sum over V of each value
      times its gradient) and d_values_BLHV -> dq_BLHQ, dk_BLGQ, dv_BLGV in their inputs' dtypes.
    """

    block_of: Callable[[jax.Array, jax.Array], int]
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def local_attention(
    q_BLHQ: jax.Array,
    k_BLGQ: jax.Array,
    v_BLGV: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    scale: float,
    kernels: Kernels,
) -> jax.Array:
    """One device's rows of `ops.attention.attention`, by these kernels."""
    length = q_BLHQ.shape[1]
    block = kernels.block_of(q_BLHQ, v_BLGV)
    inputs = (_whole_blocks(x, block) for x in (q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL))
    # What a custom gradient returns, no type says.
    values_BLHV: Any = _attention(*inputs, scale, block, kernels)
    return values_BLHV[:, :length]


def needed_blocks(segment_ids_BL: jax.Array, block: int) -> jax.Array:
    """[B, N, N] bool: a query block may see a key block, as their ranges of segment ids meet.

    The diagonal is always needed. Where ids only rise, as those of packed documents do, the key
    blocks that a query block needs have no gap, nor have the query blocks that need a key block.
    """
    batch, length = segment_ids_BL.shape
    # Padding closes a row, so it counts as the last document.
    ids_BL = jnp.where(segment_ids_BL == 0, jnp.iinfo(jnp.int32).max, segment_ids_BL)
    ids_BNm = ids_BL.reshape(batch, length // block, block)
    low_BN, high_BN = jnp.min(ids_BNm, axis=-1), jnp.max(ids_BNm, axis=-1)
    meet_BNN = (low_BN[:, :, None] <= high_BN[:, None]) & (low_BN[:, None] <= high_BN[:, :, None])
    return meet_BNN & jnp.tril(jnp.ones(meet_BNN.shape[1:], jnp.bool))


def first_key_blocks(segment_ids_BL: jax.Array, block: int) -> jax.Array:
    """[B, N] int32, the first key block that each query block needs; its own is the last."""
    return jnp.argmax(needed_blocks(segment_ids_BL, block), axis=2).astype(jnp.int32)


def last_query_blocks(segment_ids_BL: jax.Array, block: int) -> jax.Array:
    """[B, N] int32, the last query block that needs each key block; its own is the first."""
    needed_BNN = needed_blocks(segment_ids_BL, block)
    behind_BN = jnp.argmax(needed_BNN[:, ::-1], axis=1).astype(jnp.int32)
    return needed_BNN.shape[1] - 1 - behind_BN


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which differs by device where x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL, scale, block, kernels):
    return kernels.forward(q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL, scale, block)[0]


def _forward(q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL, scale, block, kernels):
    inputs = q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL
    values_BLHV, log_normalizers_BHL = kernels.forward(*inputs, scale, block)
    # Names let a rematerialization policy keep them; a kernel's results have none of their own.
    values_BLHV = checkpoint_name(values_BLHV, "attention")
    log_normalizers_BHL = checkpoint_name(log_normalizers_BHL, "attention")
    return values_BLHV, (*inputs, values_BLHV, log_normalizers_BHL)


def _backward(scale, block, kernels, kept, d_values_BLHV):
    *inputs, values_BLHV, log_normalizers_BHL = kept
    # The softmax's own gradient needs this sum over keys, which is one over v's dims as well.
    products_BLHV = d_values_BLHV.astype(jnp.float32) * values_BLHV.astype(jnp.float32)
    deltas_BHL = jnp.moveaxis(jnp.sum(products_BLHV, axis=-1), 1, 2)
    rest = log_normalizers_BHL, deltas_BHL, d_values_BLHV
    return *kernels.backward(*inputs, scale, block, *rest), None


_attention.defvjp(_forward, _backward)


def _whole_blocks(x_BL: jax.Array, block: int) -> jax.Array:
    filling = [(0, 0)] * x_BL.ndim
    filling[1] = (0, -x_BL.shape[1] % block)
    return jnp.pad(x_BL, filling)
