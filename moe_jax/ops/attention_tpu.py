"""Attention within documents by Pallas kernels for TPU.

A kernel's grid is heads times pairs of a query block and a key block, and only pairs that causality
and documents leave are in it: a block that either rules out is neither loaded nor stepped over.
The pairs of rows are a sorted list of integers in scalar memory, and their number is a dynamic
bound of the grid; rows come in groups whose pairs fit. Pairs of one result are neighbours: it is
summed up in float32 in scratch memory from its first pair to its last. The backward pass computes
scores again (Dao et al. 2022, algorithms 1 and 4).

Scores stand transposed, keys by queries. So what each query has one of (its maximum, normalizer,
segment id) is one row along the lanes of registers, and sums over keys are sums of registers.

Shapes: B batch, L length, N blocks of a row, m keys and n queries of a block, H query heads, G
key/value heads, Q query/key head dim, V value head dim.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.config import UserError
from moe_jax.ops.attention_kernels import LOWEST, Kernels, first_key_blocks, last_query_blocks, like

BLOCK = 512
LANES = 128
MOST_PAIRS = 3 << 16  # of a call: three quarters of the 1 MiB of scalar memory
END = jnp.iinfo(jnp.int32).max  # stands behind the last pair


class Order(NamedTuple):
    """How pairs are packed into integers, and so in which order they come.

    From high bits to low ones: the row, the block of the result, the other block. The result is a
    key block's (`by_key`) or a query block's.
    """

    num_blocks: int
    by_key: bool

    @property
    def bits(self) -> int:
        return (self.num_blocks - 1).bit_length()

    def pack(self, segment_ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The needed pairs in order, with END behind them, and their number [] int32."""
        batch, block = segment_ids_BL.shape[0], segment_ids_BL.shape[1] // self.num_blocks
        # Of each result's block: the first and last of the other side.
        first_BN = last_BN = jnp.broadcast_to(jnp.arange(self.num_blocks), (batch, self.num_blocks))
        if self.by_key:
            last_BN = last_query_blocks(segment_ids_BL, block)
        else:
            first_BN = first_key_blocks(segment_ids_BL, block)
        first, ends = first_BN.reshape(-1), jnp.cumsum((last_BN + 1 - first_BN).reshape(-1))
        starts = jnp.pad(ends, (1, 0))[:-1]
        # Whose range a number falls in, by comparing with all: a TPU's sort takes long to compile.
        number = jnp.arange(_most_pairs(batch, self.num_blocks) + 1)[:, None]
        inside = (starts <= number) & (number < ends)
        row, result = jnp.indices((batch, self.num_blocks), jnp.int32, sparse=True)
        result = (row << self.bits | result).reshape(-1) << self.bits
        pairs = jnp.sum(jnp.where(inside, result + first + number - starts, 0), axis=1)
        return jnp.where(number[:, 0] < ends[-1], pairs, END), ends[-1]

    def unpack(self, pair: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row, query block and key block."""
        mask = (1 << self.bits) - 1
        row, result, other = pair >> 2 * self.bits, pair >> self.bits & mask, pair & mask
        return (row, other, result) if self.by_key else (row, result, other)

    def same_result(self, pair: jax.Array, neighbour: jax.Array) -> jax.Array:
        return pair >> self.bits == neighbour >> self.bits


def block_of(q_BLHQ: jax.Array, v_BLGV: jax.Array) -> int:
    """Positions of a block: whole registers, and no more of them than a short row needs."""
    del v_BLGV
    return min(BLOCK, pl.cdiv(q_BLHQ.shape[1], LANES) * LANES)


def _in_groups_of_rows(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, a function of `Kernels`, on so many rows at a time as have `MOST_PAIRS` at most.

    Raises:
      UserError: one row has more.
    """

    def grouped(q, k, v, segment_ids, scale, block, *rest):
        batch, length = segment_ids.shape
        rows = MOST_PAIRS // _most_pairs(1, length // block)
        if not rows:
            raise UserError(
                f"rows of {length} tokens are too long for attention's TPU kernel; shorten "
                "config.data.stages, or set config.model.backends.attention=portable"
            )
        parts = []
        for i in range(0, batch, rows):
            inputs, others = (
                [x[i : i + rows] for x in arrays] for arrays in ((q, k, v, segment_ids), rest)
            )
            parts.append(kernel(*inputs, scale, block, *others))
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts) if parts[1:] else parts[0]

    return grouped


@_in_groups_of_rows
def forward(q_BLHQ, k_BLGQ, v_BLGV, segment_ids_BL, scale, block):
    """See `Kernels`."""
    q_BHLQ, k_BGLQ, v_BGLV = map(_swap_heads, (q_BLHQ, k_BLGQ, v_BLGV))
    batch, heads, length, dim_q = q_BHLQ.shape
    dim_v = v_BGLV.shape[-1]
    values_BHLV, log_normalizers_BH1L = _call(
        _forward_kernel,
        "attention_forward",
        (q_BHLQ, k_BGLQ, v_BGLV, segment_ids_BL),
        results=[
            like(q_BHLQ, (batch, heads, length, dim_v), v_BGLV.dtype),
            like(q_BHLQ, (batch, heads, 1, length), jnp.float32),
        ],
        scratch=[(dim_v, block), (1, block), (1, block)],
        width=dim_q + dim_v,
        scale=scale,
        block=block,
    )
    return _swap_heads(values_BHLV), log_normalizers_BH1L[:, :, 0]


@_in_groups_of_rows
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
    dim_q, dim_v = k_BLGQ.shape[-1], v_BLGV.shape[-1]
    q_BHLQ, k_BGLQ, v_BGLV, d_values_BHLV = map(
        _swap_heads, (q_BLHQ, k_BLGQ, v_BLGV, d_values_BLHV)
    )
    rows = log_normalizers_BHL[:, :, None], deltas_BHL[:, :, None]
    inputs = q_BHLQ, k_BGLQ, v_BGLV, segment_ids_BL, *rows, d_values_BHLV
    (dq_BHLQ,) = _call(
        _backward_dq_kernel,
        "attention_backward_dq",
        inputs,
        results=[like(q_BHLQ, q_BHLQ.shape, q_BHLQ.dtype)],
        scratch=[(dim_q, block)],
        width=2 * dim_q + dim_v,
        scale=scale,
        block=block,
    )
    dk_BGLQ, dv_BGLV = _call(
        _backward_dkv_kernel,
        "attention_backward_dkv",
        inputs,
        results=[like(q_BHLQ, x.shape, x.dtype) for x in (k_BGLQ, v_BGLV)],
        scratch=[(block, dim_q), (block, dim_v)],
        width=2 * dim_q + 2 * dim_v,
        scale=scale,
        block=block,
        by_key=True,
    )
    return _swap_heads(dq_BHLQ), _swap_heads(dk_BGLQ), _swap_heads(dv_BGLV)


KERNELS = Kernels(block_of, forward, backward)


def _swap_heads(x):
    """[B, L, heads, dim] <-> [B, heads, L, dim]."""
    return jnp.swapaxes(x, 1, 2)


def _call(kernel, name, inputs, results, scratch, width, *, scale, block, by_key=False):
    """Runs a kernel over the needed pairs.

    Args:
      inputs: as the kernel takes them; query and key blocks each have a view of the segment ids.
      results: types of what lies at query blocks or, by key, at key blocks.
      scratch: shapes of float32 sums that stay from pair to pair.
      width: the sum over a pair's products of the dim that is not a block's, for the estimate.
    """
    q, k, v, segment_ids, *others = inputs
    batch, heads, length, _ = q.shape
    share = heads // k.shape[1]
    order = Order(length // block, by_key)
    pairs, count = order.pack(segment_ids)
    # A key block's result is the sum over all heads that share it.
    outer, inner = (heads // share, share) if by_key else (heads, 1)
    segment_ids = segment_ids[:, None, None]

    def spec(x, place):
        is_row = x.shape[2] == 1

        def index(first, number, second, pairs):
            row, query_block, key_block = order.unpack(pairs[number])
            head, at = place(first * inner + second, query_block, key_block)
            return (row, head, 0, at) if is_row else (row, head, at, 0)

        return pl.BlockSpec((None, None, *((1, block) if is_row else (block, x.shape[3]))), index)

    def at_query(head, query_block, key_block):
        return head, query_block

    def at_key(head, query_block, key_block):
        return head // share, key_block

    def ids_at_query(head, query_block, key_block):
        return 0, query_block

    def ids_at_key(head, query_block, key_block):
        return 0, key_block

    operands = [q, k, v, segment_ids, segment_ids, *others]
    places = [at_query, at_key, at_key, ids_at_query, ids_at_key, *[at_query] * len(others)]
    block_pairs = heads * _most_pairs(batch, length // block)
    loaded = block * sum(x.shape[3] * x.dtype.itemsize for x in (k, v))
    return pl.pallas_call(
        functools.partial(kernel, order=order, scale=scale),
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(outer, count, inner),
            in_specs=list(map(spec, operands, places)),
            out_specs=[spec(x, at_key if by_key else at_query) for x in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        # What causality leaves: what documents rule out as well is in the data.
        cost_estimate=pl.CostEstimate(
            flops=2 * block_pairs * block * block * width,
            transcendentals=block_pairs * block * block,
            bytes_accessed=block_pairs * loaded,
        ),
    )(pairs, *operands)


def _forward_kernel(
    pairs,
    q,
    k,
    v,
    query_ids,
    key_ids,
    values,
    log_normalizers,
    sums,
    normalizers,
    highest,
    *,
    order,
    scale,
):
    blocks, first, last = _step(pairs, order)

    @pl.when(first)
    def _():
        sums[...] = jnp.zeros_like(sums)
        normalizers[...] = jnp.zeros_like(normalizers)
        highest[...] = jnp.full_like(highest, LOWEST)

    scores_mn = _scores(q, k, query_ids, key_ids, blocks, scale)
    new = jnp.maximum(highest[...], jnp.max(scores_mn, axis=0, keepdims=True))
    # A query that sees no key of a block counts all of them, at weight 1. Its own position, in the
    # last block, wipes that out: what was kept so far then weighs exp(LOWEST - new) = 0.
    weights_mn = jnp.exp(scores_mn - new)
    kept = jnp.exp(highest[...] - new)
    sums[...] = kept * sums[...] + _dot(v[...], weights_mn.astype(v.dtype), 0, 0)
    normalizers[...] = kept * normalizers[...] + jnp.sum(weights_mn, axis=0, keepdims=True)
    highest[...] = new

    @pl.when(last)
    def _():
        values[...] = (sums[...] / normalizers[...]).T.astype(values.dtype)
        log_normalizers[...] = highest[...] + jnp.log(normalizers[...])


def _backward_dq_kernel(
    pairs, q, k, v, query_ids, key_ids, log_normalizers, deltas, d_values, dq, sums, *, order, scale
):
    blocks, first, last = _step(pairs, order)

    @pl.when(first)
    def _():
        sums[...] = jnp.zeros_like(sums)

    scores_mn = _scores(q, k, query_ids, key_ids, blocks, scale)
    d_scores_mn = _weights(scores_mn, v, log_normalizers, deltas, d_values)[1]
    sums[...] += _dot(k[...], d_scores_mn.astype(k.dtype), 0, 0)

    @pl.when(last)
    def _():
        dq[...] = (sums[...] * scale).T.astype(dq.dtype)


def _backward_dkv_kernel(
    pairs,
    q,
    k,
    v,
    query_ids,
    key_ids,
    log_normalizers,
    deltas,
    d_values,
    dk,
    dv,
    sums_k,
    sums_v,
    *,
    order,
    scale,
):
    blocks, first, last = _step(pairs, order)

    @pl.when(first)
    def _():
        sums_k[...] = jnp.zeros_like(sums_k)
        sums_v[...] = jnp.zeros_like(sums_v)

    scores_mn = _scores(q, k, query_ids, key_ids, blocks, scale)
    weights_mn, d_scores_mn = _weights(scores_mn, v, log_normalizers, deltas, d_values)
    sums_k[...] += _dot(d_scores_mn.astype(q.dtype), q[...], 1, 0)
    sums_v[...] += _dot(weights_mn.astype(v.dtype), d_values[...], 1, 0)

    @pl.when(last)
    def _():
        dk[...] = (sums_k[...] * scale).astype(dk.dtype)
        dv[...] = sums_v[...].astype(dv.dtype)


def _step(pairs, order):
    """The query and key block at hand, and whether a result begins or ends here."""
    number, head = pl.program_id(1), pl.program_id(2)
    pair = pairs[number]
    previous, following = pairs[jnp.maximum(number - 1, 0)], pairs[number + 1]
    begins = (number == 0) | ~order.same_result(pair, previous)
    ends = ~order.same_result(pair, following)
    last_head = pl.num_programs(2) - 1
    return order.unpack(pair)[1:], begins & (head == 0), ends & (head == last_head)


def _scores(q, k, query_ids, key_ids, blocks, scale):
    """[m, n] float32, LOWEST where the query does not see the key."""
    scores_mn = _dot(k[...], q[...], 1, 1) * scale
    query_block, key_block = blocks
    block = q.shape[0]
    key_places_mn = jax.lax.broadcasted_iota(jnp.int32, scores_mn.shape, 0)
    query_places_1n = jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    query_places_1n += (query_block - key_block) * block
    lanes = min(LANES, block)
    key_ids_mn = jnp.tile(jnp.broadcast_to(key_ids[...], (lanes, block)).T, (1, block // lanes))
    seen_mn = (key_ids_mn == query_ids[...]) & (key_places_mn <= query_places_1n)
    return jnp.where(seen_mn, scores_mn, LOWEST)


def _weights(scores_mn, v, log_normalizers, deltas, d_values):
    """[m, n] float32: the softmax's weights, and the gradient of the scores."""
    weights_mn = jnp.exp(scores_mn - log_normalizers[...])
    d_weights_mn = _dot(v[...], d_values[...], 1, 1)
    return weights_mn, weights_mn * (d_weights_mn - deltas[...])


def _dot(a, b, dim_a, dim_b):
    dims = (((dim_a,), (dim_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _most_pairs(rows: int, num_blocks: int) -> int:
    """What causality leaves."""
    return rows * num_blocks * (num_blocks + 1) // 2
