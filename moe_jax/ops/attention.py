"""Causal attention within documents.

Rows are cut into blocks. For each query block, a loop runs over the key blocks that causality and
documents leave, so memory grows with the length and not with its square, and many short documents
in a long row cost the sum of their squares. The softmax is built up over key blocks. The backward
pass runs over key blocks, and for each over the query blocks that see it; it computes the softmax
again from its normalizer (Dao et al. 2022, algorithms 1 and 4).

Shapes: B batch, H query heads, G key/value heads, R = H / G query heads per key/value head, Q
query/key head dim, V value head dim; N blocks of all rows, A rows that are taken together (one but
where they are short), L and M queries and keys of a block; L in B L is the length of a row.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.attention_kernels import local_attention
from moe_jax.sharding import BATCH, BATCH_AXES, P

BLOCK = 512  # positions of a block; fewer with many heads
SCORES = 2**20  # of rows that are taken together, if each is one block
LOWEST = -1e30  # stands for -inf where a difference of two would be no number


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
    """One device's rows, cut into blocks."""
    batch, length, heads, _ = q_BLHQ.shape
    groups, block = k_BLGQ.shape[2], _block(length, heads)
    blocks = -(-length // block)
    rows = _rows_at_once(batch, heads * block**2) if blocks == 1 else 1

    def cut(x_BL, *heads):
        x = jnp.pad(x_BL, [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (x_BL.ndim - 2))
        x = x.reshape(-1, rows, blocks, block, *heads, *x.shape[3:])
        x = jnp.moveaxis(jnp.moveaxis(x, 2, 1), 3, 3 + len(heads))
        return x.reshape(-1, rows, *x.shape[3:])

    # What a custom gradient returns, no type says.
    values: Any = _blockwise(
        cut(q_BLHQ, groups, heads // groups),
        cut(k_BLGQ, groups),
        cut(v_BLGV, groups),
        cut(segment_ids_BL),
        scale,
        blocks,
    )
    values = values.reshape(-1, blocks, rows, heads, block, values.shape[-1])
    values = jnp.moveaxis(jnp.moveaxis(values, 1, 2), 4, 3)
    return values.reshape(batch, blocks * block, heads, -1)[:, :length]


def _block(length: int, heads: int) -> int:
    """Positions of a block: few enough for a pair's scores to stay in the caches."""
    block = BLOCK
    while block > 128 and heads * block**2 > 4 * SCORES:
        block //= 2
    return min(block, length)


def _rows_at_once(batch: int, scores: int) -> int:
    """How many rows to take together, if each has so many scores."""
    fit = max(1, SCORES // scores)
    return max(rows for rows in range(1, batch + 1) if batch % rows == 0 and rows <= fit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blockwise(q_NAGRLQ, k_NAGMQ, v_NAGMV, ids_NAL, scale, blocks):
    """[N, A, G, R, L, V] in v's dtype."""
    return _forward(q_NAGRLQ, k_NAGMQ, v_NAGMV, ids_NAL, scale, blocks)[0]


def _forward(q_NAGRLQ, k_NAGMQ, v_NAGMV, ids_NAL, scale, blocks):
    def of_query(_, inputs):
        number, first, q = inputs
        sums, normalizers = _zeros((*q.shape[:-1], v_NAGMV.shape[-1])), _zeros(q.shape[:-1])

        def add(key, carry):
            sums, normalizers, highest = carry
            mask = _mask(ids_NAL, number, key)[:, None, None]
            scores = _dot("agrlq,agmq->agrlm", q, k_NAGMQ[key]) * scale + mask
            new = jnp.maximum(highest, jnp.max(scores, axis=-1))
            # Of a query that has seen no key yet these are of no use, and go when it sees one.
            weights = jnp.exp(scores - new[..., None])
            kept = jnp.exp(highest - new)
            values = _dot("agrlm,agmv->agrlv", weights.astype(v_NAGMV.dtype), v_NAGMV[key])
            normalizers = kept * normalizers + jnp.sum(weights, axis=-1)
            return kept[..., None] * sums + values, normalizers, new

        start = sums, normalizers, normalizers + LOWEST
        sums, normalizers, highest = jax.lax.fori_loop(first, number + 1, add, start)
        values = (sums / normalizers[..., None]).astype(v_NAGMV.dtype)
        return None, (values, highest + jnp.log(normalizers))

    numbers, first_N, _ = _ranges(ids_NAL, blocks)
    _, kept = jax.lax.scan(of_query, None, (numbers, first_N, q_NAGRLQ))
    # Names let a rematerialization policy keep them; a loop's results have none of their own.
    values, log_normalizers = checkpoint_name(kept, "attention")
    return values, (q_NAGRLQ, k_NAGMQ, v_NAGMV, ids_NAL, values, log_normalizers)


def _backward(scale, blocks, kept, d_values_NAGRLV):
    q_NAGRLQ, k_NAGMQ, v_NAGMV, ids_NAL, values, log_normalizers = kept
    # The softmax's own gradient needs this sum over keys, which is one over v's dims as well.
    deltas = jnp.sum(d_values_NAGRLV.astype(jnp.float32) * values.astype(jnp.float32), axis=-1)

    def of_key(dq_NAGQRL, inputs):
        number, last, k, k_transposed, v = inputs

        # Scores lie keys first: so each product has its operands as they lie.
        def add(query, carry):
            dq_NAGQRL, dk, dv = carry
            q, d_values = q_NAGRLQ[query], d_values_NAGRLV[query]
            mask = jnp.swapaxes(_mask(ids_NAL, query, number), 1, 2)[:, None, :, None]
            scores = _dot("agmq,agrlq->agmrl", k, q) * scale + mask
            weights = jnp.exp(scores - log_normalizers[query][:, :, None])
            d_weights = _dot("agmv,agrlv->agmrl", v, d_values)
            d_scores = weights * (d_weights - deltas[query][:, :, None]) * scale
            d_scores, weights = d_scores.astype(k.dtype), weights.astype(v.dtype)
            return (
                dq_NAGQRL.at[query].add(_dot("agqm,agmrl->agqrl", k_transposed, d_scores)),
                dk + _dot("agmrl,agrlq->agmq", d_scores, q),
                dv + _dot("agmrl,agrlv->agmv", weights, d_values),
            )

        start = dq_NAGQRL, _zeros(k.shape), _zeros(v.shape)
        dq_NAGQRL, dk, dv = jax.lax.fori_loop(number, last + 1, add, start)
        return dq_NAGQRL, (dk.astype(k.dtype), dv.astype(v.dtype))

    numbers, _, last_N = _ranges(ids_NAL, blocks)
    dq_NAGQRL = _zeros(jnp.moveaxis(q_NAGRLQ, -1, 3).shape)
    # Turned over out here: in the loop, XLA makes a product of it that it lacks on CPU in bfloat16.
    k_NAGQM = jnp.swapaxes(k_NAGMQ, -1, -2)
    inputs = numbers, last_N, k_NAGMQ, k_NAGQM, v_NAGMV
    dq_NAGQRL, (dk, dv) = jax.lax.scan(of_key, dq_NAGQRL, inputs)
    return jnp.moveaxis(dq_NAGQRL, 3, -1).astype(q_NAGRLQ.dtype), dk, dv, None


_blockwise.defvjp(_forward, _backward)


def _ranges(ids_NAL: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each block its number, the first key block that it needs, and the last that needs it.

    [N] int32 each. Two blocks need each other where their ranges of segment ids meet, in any of
    the rows.
    """
    # Padding closes a row, so it counts as the last document.
    ids = jnp.where(ids_NAL == 0, jnp.iinfo(jnp.int32).max, ids_NAL)
    ids = ids.reshape(-1, blocks, *ids.shape[1:])
    low, high = jnp.min(ids, axis=-1), jnp.max(ids, axis=-1)
    meet = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    needed = jnp.any(meet, axis=-1) & jnp.tril(jnp.ones((blocks, blocks), jnp.bool))
    start = jnp.arange(len(ids), dtype=jnp.int32)[:, None] * blocks
    first = jnp.argmax(needed, axis=2).astype(jnp.int32)
    last = blocks - 1 - jnp.argmax(needed[:, ::-1], axis=1).astype(jnp.int32)
    numbers = jnp.arange(len(ids_NAL), dtype=jnp.int32)
    return numbers, (start + first).reshape(-1), (start + last).reshape(-1)


def _mask(ids_NAL: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """0 where a query of a block sees a key of a block, else LOWEST: [A, L, M] float32."""
    block = ids_NAL.shape[-1]
    place = jnp.arange(block)
    earlier = (query - key) * block + place[:, None] >= place
    same = ids_NAL[query][:, :, None] == ids_NAL[key][:, None]
    return jnp.where(earlier & same, 0.0, LOWEST)


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
