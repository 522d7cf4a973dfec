"""Attention within documents by Pallas kernels for GPU (Triton).

A program makes one block of a result: of the values, of dq, or of dk and dv together. It goes over
the other side in steps, from the first to the last that causality and documents leave, so many
short documents in a long row cost the sum of their squares. The backward pass computes scores again
(Dao et al. 2022, algorithms 1 and 4).

Dims of Triton's arrays are powers of two, so a head dim of 192 is taken in parts of 128 and 64.

Shapes: B batch, L length, N blocks of a row, M steps of a row, n positions of a block, m positions
of a step, H query heads, G key/value heads, R = H / G, Q query/key head dim, V value head dim.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_jax.ops.attention_kernels import LOWEST, Kernels, first_key_blocks, last_query_blocks, like

BLOCK = 128
STEP = 64
SHARED_MEMORY = 227 * 1024  # bytes a program may use, H100
SMALLEST_PART = 16  # a dim of a tensor core's product
LARGE = re.compile(r"\bG?[HB]\d|\bA100")  # in the names of devices with as much, or nearly


def obstacle(dtype: Any, dim_q: int, dim_v: int) -> str | None:
    """Why the kernels cannot take such heads on the mesh's devices; None if they can."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "gpu" and not LARGE.search(device.device_kind):
        return f"need more shared memory than a {device.device_kind} has"
    if 3 * STEP * (dim_q + dim_v) * jnp.dtype(dtype).itemsize > SHARED_MEMORY:
        return f"need more shared memory than there is for head dims {dim_q} and {dim_v} in {dtype}"
    return None


def block_of(q_BLHQ: jax.Array, v_BLGV: jax.Array) -> int:
    """Positions of a block: a block and two steps of a query and a value lie in shared memory."""
    position = q_BLHQ.shape[3] * q_BLHQ.dtype.itemsize + v_BLGV.shape[3] * v_BLGV.dtype.itemsize
    return BLOCK if (BLOCK + 2 * STEP) * position <= SHARED_MEMORY else STEP


def forward(q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL, scale, block):
    """See `Kernels`."""
    batch, length, heads, dim_q = q_BLHQ.shape
    share, dim_v = heads // k_BLGQ.shape[2], v_BLGV.shape[3]
    q_BLHQ, k_BLGQ, v_BLGV = map(_whole_parts, (q_BLHQ, k_BLGQ, v_BLGV))
    values_BLHV, log_normalizers_BHL = _call(
        _forward_kernel,
        "attention_forward",
        (length // block, heads, batch),
        [
            (first_step(segment_ids_BL, block), _number()),
            (q_BLHQ, _block(q_BLHQ, block)),
            (k_BLGQ, _row(k_BLGQ, share)),
            (v_BLGV, _row(v_BLGV, share)),
            (segment_ids_BL, _ids(length)),
        ],
        [
            (
                like(q_BLHQ, (*q_BLHQ.shape[:3], v_BLGV.shape[3]), v_BLGV.dtype),
                _block(v_BLGV, block),
            ),
            (like(q_BLHQ, (batch, heads, length), jnp.float32), _block_numbers(block)),
        ],
        scale,
        block,
        dim_q + dim_v,
    )
    return values_BLHV[..., :dim_v], log_normalizers_BHL


def backward(
    q_BLHQ,
    k_BLGQ,
    v_BLGV,
    segment_ids_BL,
    scale,
    block,
    log_normalizers_BHL,
    deltas_BHL,
    d_values_BLHV,
):
    """See `Kernels`."""
    batch, length, heads, dim_q = q_BLHQ.shape
    groups, dim_v = v_BLGV.shape[2:]
    share = heads // groups
    q, k, v, d_values = map(_whole_parts, (q_BLHQ, k_BLGQ, v_BLGV, d_values_BLHV))
    (dq_BLHQ,) = _call(
        _backward_dq_kernel,
        "attention_backward_dq",
        (length // block, heads, batch),
        [
            (first_step(segment_ids_BL, block), _number()),
            (q, _block(q, block)),
            (k, _row(k, share)),
            (v, _row(v, share)),
            (segment_ids_BL, _ids(length)),
            (log_normalizers_BHL, _block_numbers(block)),
            (deltas_BHL, _block_numbers(block)),
            (d_values, _block(d_values, block)),
        ],
        [(like(q, q.shape, q.dtype), _block(q, block))],
        scale,
        block,
        2 * dim_q + dim_v,
    )
    dk_BLGQ, dv_BLGV = _call(
        _backward_dkv_kernel,
        "attention_backward_dkv",
        (length // block, groups, batch),
        [
            (end_step(segment_ids_BL, block), _number()),
            (q, _rows(q, share)),
            (k, _block(k, block)),
            (v, _block(v, block)),
            (segment_ids_BL, _ids(length)),
            (log_normalizers_BHL, _rows_numbers(share, length)),
            (deltas_BHL, _rows_numbers(share, length)),
            (d_values, _rows(d_values, share)),
        ],
        [(like(q, x.shape, x.dtype), _block(x, block)) for x in (k, v)],
        scale,
        block,
        2 * dim_q + 2 * dim_v,
    )
    return dq_BLHQ[..., :dim_q], dk_BLGQ[..., :dim_q], dv_BLGV[..., :dim_v]


KERNELS = Kernels(block_of, forward, backward)


def first_step(segment_ids_BL: jax.Array, block: int) -> jax.Array:
    """[B, N] int32, the first step over keys that some query of a block needs."""
    return jnp.min(_by_block(first_key_blocks(segment_ids_BL, STEP), block), axis=2)


def end_step(segment_ids_BL: jax.Array, block: int) -> jax.Array:
    """[B, N] int32, one behind the last step over queries that needs some key of a block."""
    return jnp.max(_by_block(last_query_blocks(segment_ids_BL, STEP), block), axis=2) + 1


def _by_block(x_BM, block):
    return x_BM.reshape(x_BM.shape[0], -1, block // STEP)


def _call(kernel, name, grid, inputs, results, scale, block, width):
    """Runs a kernel over a grid of blocks, heads and rows.

    Args:
      inputs: arrays, each with what a program sees of it; the second are the queries.
      results: types, likewise.
      width: the sum over products of the dim that is not a position, for the estimate.
    """
    blocks, _, rows = grid
    query_heads = inputs[1][0].shape[2]
    pairs = rows * query_heads * blocks * (blocks + 1) // 2
    return pl.pallas_call(
        functools.partial(kernel, scale=scale),
        name=name,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in results],
        out_shape=[x for x, _ in results],
        # Where blocks are small for want of memory, the next step is not loaded ahead either.
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2 if block == BLOCK else 1),
        # What causality leaves: what documents rule out as well is in the data.
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * block * block * width,
            transcendentals=pairs * block * block,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x, _ in (*inputs, *results)),
        ),
    )(*[x for x, _ in inputs])


def _number():
    """Of [B, N], the block's own number: []."""
    return pl.BlockSpec((None, None), lambda i, h, b: (b, i))


def _ids(length):
    """Of [B, L], the row's ids: [L]."""
    return pl.BlockSpec((None, length), lambda i, h, b: (b, 0))


def _block(x, block):
    """Of [B, L, heads, dim], one block: [n, dim]."""
    return pl.BlockSpec((None, block, None, x.shape[3]), lambda i, h, b: (b, i, h, 0))


def _row(x, share):
    """Of [B, L, G, dim], the row of a query head: [L, dim]."""
    shape = None, x.shape[1], None, x.shape[3]
    return pl.BlockSpec(shape, lambda i, h, b: (b, 0, h // share, 0))


def _rows(x, share):
    """Of [B, L, H, dim], the rows of the query heads of a key/value head: [L, R, dim]."""
    return pl.BlockSpec((None, x.shape[1], share, x.shape[3]), lambda i, h, b: (b, 0, h, 0))


def _block_numbers(block):
    """Of [B, H, L], one block: [n]."""
    return pl.BlockSpec((None, None, block), lambda i, h, b: (b, h, i))


def _rows_numbers(share, length):
    """Of [B, H, L], the rows of the query heads of a key/value head: [R, L]."""
    return pl.BlockSpec((None, share, length), lambda i, h, b: (b, h, 0))


def _forward_kernel(first, q, k, v, ids, values, log_normalizers, *, scale):
    block = q.shape[0]
    queries = _places(ids, pl.program_id(0) * block, block)
    q_parts = _load(q)

    def add(step, carry):
        sums, normalizers_n, highest_n = carry
        keys = _places(ids, step * STEP, STEP)
        here = pl.ds(step * STEP, STEP)
        scores_nm = _dots(q_parts, _load(k, here)) * scale
        scores_nm = jnp.where(_seen(queries, keys, 0), scores_nm, LOWEST)
        new_n = jnp.maximum(highest_n, jnp.max(scores_nm, axis=1))
        # A query that sees no key of a step counts all of them, at weight 1. The step with its own
        # position wipes that out: what was kept so far then weighs exp(LOWEST - new) = 0.
        weights_nm = jnp.exp(scores_nm - new_n[:, None])
        kept_n = jnp.exp(highest_n - new_n)
        added = _products(weights_nm, _load(v, here))
        sums = [kept_n[:, None] * old + new for old, new in zip(sums, added, strict=True)]
        return sums, kept_n * normalizers_n + jnp.sum(weights_nm, axis=1), new_n

    zeros_n = jnp.zeros(block, jnp.float32)
    carry = _zeros(block, v), zeros_n, zeros_n + LOWEST
    end = (pl.program_id(0) + 1) * (block // STEP)
    sums, normalizers_n, highest_n = jax.lax.fori_loop(first[...], end, add, carry)
    _store(values, [x / normalizers_n[:, None] for x in sums])
    log_normalizers[...] = highest_n + jnp.log(normalizers_n)


def _backward_dq_kernel(first, q, k, v, ids, log_normalizers, deltas, d_values, dq, *, scale):
    block = q.shape[0]
    queries = _places(ids, pl.program_id(0) * block, block)
    q_parts, d_values_parts = _load(q), _load(d_values)
    log_normalizers_n, deltas_n = log_normalizers[...], deltas[...]

    def add(step, sums):
        keys = _places(ids, step * STEP, STEP)
        here = pl.ds(step * STEP, STEP)
        k_parts = _load(k, here)
        scores_nm = _dots(q_parts, k_parts) * scale
        scores_nm = jnp.where(_seen(queries, keys, 0), scores_nm, LOWEST)
        weights_nm = jnp.exp(scores_nm - log_normalizers_n[:, None])
        d_weights_nm = _dots(d_values_parts, _load(v, here))
        d_scores_nm = weights_nm * (d_weights_nm - deltas_n[:, None])
        return [a + b for a, b in zip(sums, _products(d_scores_nm, k_parts), strict=True)]

    end = (pl.program_id(0) + 1) * (block // STEP)
    sums = jax.lax.fori_loop(first[...], end, add, _zeros(block, q))
    _store(dq, [x * scale for x in sums])


def _backward_dkv_kernel(end, q, k, v, ids, log_normalizers, deltas, d_values, dk, dv, *, scale):
    block = k.shape[0]
    keys = _places(ids, pl.program_id(0) * block, block)
    k_parts, v_parts = _load(k), _load(v)

    # Scores stand keys by queries here, as both products over queries take them.
    def add(step, sums, head):
        queries = _places(ids, step * STEP, STEP)
        here = pl.ds(step * STEP, STEP)
        q_parts, d_values_parts = _load(q, here, head), _load(d_values, here, head)
        scores_nm = _dots(k_parts, q_parts) * scale
        scores_nm = jnp.where(_seen(queries, keys, 1), scores_nm, LOWEST)
        weights_nm = jnp.exp(scores_nm - log_normalizers[head, here])
        d_weights_nm = _dots(v_parts, d_values_parts)
        d_scores_nm = weights_nm * (d_weights_nm - deltas[head, here])
        added = _products(d_scores_nm, q_parts) + _products(weights_nm, d_values_parts)
        return [a + b for a, b in zip(sums, added, strict=True)]

    start = pl.program_id(0) * (block // STEP)

    def add_head(head, sums):
        return jax.lax.fori_loop(start, end[...], functools.partial(add, head=head), sums)

    sums = jax.lax.fori_loop(0, q.shape[1], add_head, _zeros(block, k) + _zeros(block, v))
    num_parts = len(k_parts)
    _store(dk, [x * scale for x in sums[:num_parts]])
    _store(dv, sums[num_parts:])


def _places(ids, start, size):
    """Segment ids and positions, each [size]."""
    return ids[pl.ds(start, size)], start + jnp.arange(size)


def _seen(queries, keys, query_axis):
    """Which queries see which keys, bool."""
    (query_ids, query_places), (key_ids, key_places) = (
        [jnp.expand_dims(x, axis) for x in side]
        for side, axis in ((queries, 1 - query_axis), (keys, query_axis))
    )
    return (query_ids == key_ids) & (query_places >= key_places)


def _parts(dim):
    """Start and size of each part of a head dim; sizes are powers of two."""
    start = 0
    while start < dim:
        size = 1 << (dim - start).bit_length() - 1
        yield start, size
        start += size


def _load(ref, *where):
    """The parts of the head dim, of all positions or of those at `where`."""
    where = where or (slice(None),)
    return [ref[*where, pl.ds(*part)] for part in _parts(ref.shape[-1])]


def _store(ref, parts):
    for part, value in zip(_parts(ref.shape[-1]), parts, strict=True):
        ref[:, pl.ds(*part)] = value.astype(ref.dtype)


def _zeros(block, ref):
    return [jnp.zeros((block, size), jnp.float32) for _, size in _parts(ref.shape[-1])]


def _dots(a_parts, b_parts):
    """The product over the head dim: its parts' sum."""
    contract = (((1,), (1,)), ((), ()))
    return sum(
        jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)
        for a, b in zip(a_parts, b_parts, strict=True)
    )


def _products(x, parts):
    """x times each part, in the parts' dtype."""
    return [
        jnp.dot(x.astype(part.dtype), part, preferred_element_type=jnp.float32) for part in parts
    ]


def _whole_parts(x):
    """Head dims filled up, so that the smallest part fits a tensor core."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[3] % SMALLEST_PART)])
