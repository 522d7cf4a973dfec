"""Causal attention within documents.

The row is cut into blocks. A loop runs over the pairs of a query block and a key block that
causality and documents leave, so memory grows with the length and not with its square, and many
short documents in a long row cost the sum of their squares. The softmax is built up over key
blocks, and the backward pass computes it again from its normalizer (Dao et al. 2022, algorithms 1
and 4).

Shapes: B batch, L and M query and key length, H query heads, G key/value heads, R = H / G query
heads per key/value head, Q query/key head dim, V value head dim, m positions of a block.
"""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.attention_kernels import local_attention
from moe_jax.sharding import BATCH, BATCH_AXES, P

BLOCK = 256
LOWEST = -1e30  # stands for -inf where a difference of two would be no number


class Pairs(NamedTuple):
    """The pairs of blocks to compute: row, query block and key block [pairs] int32; count [].

    Pairs past the count are of no use.
    """

    row: jax.Array
    query: jax.Array
    key: jax.Array
    count: jax.Array


def attention(
    q_BLHQ: jax.Array,
    k_BLGQ: jax.Array,
    v_BLGV: jax.Array,
    segment_ids_BL: jax.Array,
    scale: float,
    backend: str = "portable",
) -> jax.Array:
    """softmax(scale * q k^T) v over earlier positions of the same segment.

    Products take the operands as they come and sum in float32; the softmax is float32. Rows lie as
    activations do on the current mesh.

    Args:
      q_BLHQ: [batch, length, heads, qk dim].
      k_BLGQ: [batch, length, key/value heads, qk dim]; neighbouring query heads share one of them.
      v_BLGV: [batch, length, key/value heads, v dim]; its head dim may differ.
      segment_ids_BL: [batch, length] int32; a position attends to its own id only.
      scale: factor on the scores.
      backend: "portable" (plain JAX), "tpu" or "gpu" (Pallas kernels).
    Returns:
      [batch, length, heads, v dim] in v's dtype.
    """
    if backend == "portable":
        local = functools.partial(_local_attention, scale=scale)
    else:  # Imported only where it is needed: Pallas takes a while.
        kernels = importlib.import_module(f"moe_jax.ops.attention_{backend}").KERNELS
        local = functools.partial(local_attention, scale=scale, kernels=kernels)
    return jax.shard_map(local, in_specs=(BATCH, BATCH, BATCH, BATCH), out_specs=BATCH)(
        q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL
    )


def _local_attention(q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL, *, scale):
    """One device's rows, with heads in front and the length filled up to whole blocks."""
    batch, length, heads, _ = q_BLHQ.shape
    groups, block = k_BLGQ.shape[2], min(BLOCK, length)

    def blocks_first(x, *heads):
        x = jnp.pad(x, [(0, 0), (0, -length % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x, 1, -2).reshape(batch, *heads, x.shape[1], x.shape[-1])

    q_BGRLQ = blocks_first(q_BLHQ, groups, heads // groups)
    k_BGLQ, v_BGLV = blocks_first(k_BLGQ, groups), blocks_first(v_BLGV, groups)
    segment_ids_BL = jnp.pad(segment_ids_BL, [(0, 0), (0, -length % block)])
    # What a custom gradient returns, no type says.
    values: Any = _blockwise(q_BGRLQ, k_BGLQ, v_BGLV, segment_ids_BL, scale, block)
    values = values.reshape(batch, heads, *values.shape[-2:])[:, :, :length]
    return jnp.moveaxis(values, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blockwise(q_BGRLQ, k_BGLQ, v_BGLV, segment_ids_BL, scale, block):
    """[B, G, R, L, V] in v's dtype."""
    return _forward(q_BGRLQ, k_BGLQ, v_BGLV, segment_ids_BL, scale, block)[0]


def _forward(q, k, v, segment_ids, scale, block):
    pairs = _pairs(segment_ids, block)
    sums = _zeros((*q.shape[:-1], v.shape[-1]))
    normalizers, highest = _zeros(q.shape[:-1]), _zeros(q.shape[:-1]) + LOWEST

    def add(number, carry):
        sums, normalizers, highest = carry
        row, i, j = pairs.row[number], pairs.query[number], pairs.key[number]
        at_query = functools.partial(_block, row=row, number=i, block=block)
        at_key = functools.partial(_block, row=row, number=j, block=block)
        scores = _dot("grlq,gmq->grlm", at_query(q), at_key(k)) * scale
        seen = _seen(segment_ids, row, i, j, block)
        old = at_query(highest, last=True)
        new = jnp.maximum(old, jnp.max(jnp.where(seen, scores, LOWEST), axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new[..., None]), 0.0)
        kept = jnp.exp(old - new)
        value = _dot("grlm,gmv->grlv", weights.astype(v.dtype), at_key(v))
        normalizer = kept * at_query(normalizers, last=True) + jnp.sum(weights, axis=-1)
        put = functools.partial(_put, row=row, number=i, block=block)
        return (
            put(sums, kept[..., None] * at_query(sums) + value),
            put(normalizers, normalizer, last=True),
            put(highest, new, last=True),
        )

    start = (sums, normalizers, highest)
    sums, normalizers, highest = jax.lax.fori_loop(0, pairs.count, add, start)
    values = (sums / normalizers[..., None]).astype(v.dtype)
    # Names let a rematerialization policy keep them; a loop's results have none of their own.
    log_normalizers = checkpoint_name(highest + jnp.log(normalizers), "attention")
    values = checkpoint_name(values, "attention")
    return values, (q, k, v, segment_ids, values, log_normalizers)


def _backward(scale, block, kept, d_values):
    q, k, v, segment_ids, values, log_normalizers = kept
    pairs = _pairs(segment_ids, block)
    # The softmax's own gradient needs this sum over keys, which is one over v's dims as well.
    deltas = jnp.sum(d_values.astype(jnp.float32) * values.astype(jnp.float32), axis=-1)

    def add(number, carry):
        dq, dk, dv = carry
        row, i, j = pairs.row[number], pairs.query[number], pairs.key[number]
        at_query = functools.partial(_block, row=row, number=i, block=block)
        at_key = functools.partial(_block, row=row, number=j, block=block)
        q_i, k_j, d_values_i = at_query(q), at_key(k), at_query(d_values)
        scores = _dot("grlq,gmq->grlm", q_i, k_j) * scale
        exponents = scores - at_query(log_normalizers, last=True)[..., None]
        weights = jnp.where(_seen(segment_ids, row, i, j, block), jnp.exp(exponents), 0.0)
        d_weights = _dot("grlv,gmv->grlm", d_values_i, at_key(v))
        d_scores = weights * (d_weights - at_query(deltas, last=True)[..., None]) * scale
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(v.dtype)
        put_query = functools.partial(_put, row=row, number=i, block=block)
        put_key = functools.partial(_put, row=row, number=j, block=block)
        return (
            put_query(dq, at_query(dq) + _dot("grlm,gmq->grlq", d_scores, k_j)),
            put_key(dk, at_key(dk) + _dot("grlm,grlq->gmq", d_scores, q_i)),
            put_key(dv, at_key(dv) + _dot("grlm,grlv->gmv", weights, d_values_i)),
        )

    start = (_zeros(q.shape), _zeros(k.shape), _zeros(v.shape))
    dq, dk, dv = jax.lax.fori_loop(0, pairs.count, add, start)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_forward, _backward)


def _pairs(segment_ids_BL: jax.Array, block: int) -> Pairs:
    """The pairs of blocks in which some query may see some key: ranges of segment ids that meet."""
    batch, length = segment_ids_BL.shape
    # Padding closes a row, so it counts as the last document.
    ids = jnp.where(segment_ids_BL == 0, jnp.iinfo(jnp.int32).max, segment_ids_BL)
    ids_BNm = ids.reshape(batch, length // block, block)
    low, high = jnp.min(ids_BNm, axis=-1), jnp.max(ids_BNm, axis=-1)
    meet = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    needed = meet & jnp.tril(jnp.ones(meet.shape[1:], jnp.bool))
    # The needed ones first, in order.
    chosen = jnp.argsort(~needed.reshape(-1), stable=True).astype(jnp.int32)
    row, query, key = jnp.unravel_index(chosen, needed.shape)
    return Pairs(row, query, key, jnp.sum(needed, dtype=jnp.int32))


def _seen(segment_ids_BL, row, i, j, block):
    """Which keys of block j each query of block i sees: [m, m] bool."""

    def of(number):
        ids = jax.lax.dynamic_slice(segment_ids_BL, (row, number * block), (1, block))[0]
        return ids, number * block + jnp.arange(block)

    (query_ids, query_places), (key_ids, key_places) = of(i), of(j)
    same = query_ids[:, None] == key_ids
    return same & (query_places[:, None] >= key_places)


def _place(x, row, number, block, last):
    """Where the block starts in x, whose length is its last dim or the one before."""
    dim = x.ndim - (1 if last else 2)
    start = [jnp.zeros_like(row)] * x.ndim
    start[0], start[dim] = row, number * block
    return start, dim


def _block(x, *, row, number, block, last=False):
    start, dim = _place(x, row, number, block, last)
    sizes = list(x.shape)
    sizes[0], sizes[dim] = 1, block
    return jax.lax.dynamic_slice(x, start, sizes)[0]


def _put(x, value, *, row, number, block, last=False):
    start, _ = _place(x, row, number, block, last)
    return jax.lax.dynamic_update_slice(x, value[None].astype(x.dtype), start)


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _zeros(shape):
    """Zeros that may differ by device, as what is added to them does."""
    return jax.lax.pcast(jnp.zeros(shape, jnp.float32), BATCH_AXES, to="varying")


def attention_reference(
    q_BLHQ: jax.Array,
    k_BLGQ: jax.Array,
    v_BLGV: jax.Array,
    segment_ids_BL: jax.Array,
    scale: float,
) -> jax.Array:
    """The same with all scores of a row at once."""
    length = q_BLHQ.shape[1]
    causal = jnp.tril(jnp.ones((length, length), jnp.bool))
    same = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    return masked_attention(q_BLHQ, k_BLGQ, v_BLGV, causal & same, scale)


def masked_attention(
    q_BLHQ: jax.Array,
    k_BMGQ: jax.Array,
    v_BMGV: jax.Array,
    seen_BLM: jax.Array,
    scale: float,
) -> jax.Array:
    """softmax(scale * q k^T) v over the keys that each query sees; at least one each.

    Args:
      q_BLHQ: [batch, length, heads, qk dim].
      k_BMGQ, v_BMGV: [batch, keys, key/value heads, dim].
      seen_BLM: [batch, length, keys] bool.
      scale: factor on the scores.
    Returns:
      [batch, length, heads, v dim] in v's dtype.
    """
    batch, length, heads, dim = q_BLHQ.shape
    groups = k_BMGQ.shape[2]
    q_BLGRQ = _reshape_rows(q_BLHQ, (batch, length, groups, heads // groups, dim))
    scores = jnp.einsum("blgrq,bmgq->bgrlm", q_BLGRQ, k_BMGQ, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_BLM[:, None, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BMGV.dtype)
    values = jnp.einsum("bgrlm,bmgv->blgrv", weights, v_BMGV)
    return _reshape_rows(values, (batch, length, heads, v_BMGV.shape[-1]))


def _reshape_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x.reshape(shape), which alone forgets how the first dim is split where that has one row."""
    spec = jax.typeof(x).sharding.spec
    if not spec or spec[0] is None:
        return x.reshape(shape)
    return jnp.reshape(x, shape, out_sharding=P(spec[0]))
