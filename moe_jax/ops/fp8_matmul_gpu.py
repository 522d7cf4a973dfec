"""Products of FP8 operands on NVIDIA Hopper GPUs, as Pallas kernels with DeepSeek-V3's scaling.

Both operands lie with the summed dim last, as the tensor cores want FP8, and have a scale for each
128 of it. Tensor cores add up these 128, and the sum, times its scales, is added to the block of
the result in float32 ("promotion", section 3.3.2 of the report), by one of the two multiplying warp
groups of `blocks_gpu` while the other multiplies. A step is 128 of the sum.

In a step the tensor cores take 1,024 cycles for a block of 128 x 256. Promotion takes the units for
float32 256 of them if a scale belongs to all columns (a fused product and sum for each element),
and 512 if each has its own: it hides behind the products. A thread holds its sums in 128 registers
of the 232 that it has, so that what the tensor cores are at is half as wide, 64 registers.

Shapes: S slots in N tiles, E experts, A summed dim of the forward product, B its result's dim; K, L
and M blocks of 128 of A, B and S.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.config import UserError
from moe_jax.ops.blocks_gpu import (
    COLUMNS,
    DIMS,
    PROGRAMS,
    ROWS,
    ROWS_EACH,
    Block,
    call,
    make_blocks,
    place,
    span,
    swizzled,
)
from moe_jax.ops.grouped_matmul_gpu import HOPPER, TILE_SIZE, tiles_of_experts

SCALED = 128  # values of the summed dim that share a scale: a step
PIECE = 128  # columns that are multiplied at a time
FORMAT = jnp.float8_e4m3fn


def gmm_fp8(
    x_SA: jax.Array,
    x_scales_SK: jax.Array,
    w_EBA: jax.Array,
    w_scales_ELK: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    *,
    dtype: Any = jnp.bfloat16,
    interpret: Any = None,
    programs: int = PROGRAMS,
) -> jax.Array:
    """Each tile's rows times the matrix of its expert: [S, B], summed in float32.

    Args:
      x_SA: [slots, A] float8_e4m3fn, TILE_SIZE slots a tile.
      x_scales_SK: [slots, blocks of A] float32.
      w_EBA: [experts, B, A] float8_e4m3fn.
      w_scales_ELK: [experts, blocks of B, blocks of A] float32.
      expert_of_tile_N: [tiles] int32.
      used: [] int32, the tiles to compute; rows of others keep what was in memory.
      dtype: of the result, bfloat16 or float32.
      interpret: None, or how to run on a CPU (`pallas.mosaic_gpu.InterpretGPUParams`).
      programs: that share the blocks out.
    Raises:
      ValueError: for what the kernels cannot take.
    """
    (num_slots, num_summed), num_columns = x_SA.shape, w_EBA.shape[1]
    _check(x_SA, w_EBA)
    steps, column_blocks = pl.cdiv(num_summed, SCALED), pl.cdiv(num_columns, COLUMNS)
    last_scale = pl.cdiv(num_columns, SCALED) - 1
    assert num_slots == len(expert_of_tile_N) * TILE_SIZE, (num_slots, len(expert_of_tile_N))
    assert x_scales_SK.shape == (num_slots, steps), x_scales_SK.shape
    assert w_scales_ELK.shape == (len(w_EBA), last_scale + 1, steps), w_scales_ELK.shape

    def matmul_fp8(
        expert_ref, used_ref, w_scales_ref, x_ref, w_ref, x_scales_ref, out_ref, *buffers
    ):
        used = used_ref[0]

        def block(index):
            tile, column_block = place(index, used, column_blocks)
            rows, columns = span(tile, ROWS), span(column_block, COLUMNS)
            expert = expert_ref[tile]

            def operands(step):
                summed = span(step, SCALED)
                w_block = w_ref.at[expert, columns, summed]
                return x_ref.at[rows, summed], w_block, x_scales_ref.at[step, rows]

            def scales(step, start, row_scales):
                scale = column_block * (COLUMNS // SCALED) + start // SCALED
                column_scale = w_scales_ref[expert, jnp.minimum(scale, last_scale), step]
                return _along(row_scales * column_scale, 0)

            total = functools.partial(_total, scales, jnp.minimum(used, 1))
            return Block(steps, operands, total, out_ref.at[rows, columns])

        make_blocks(used * column_blocks, block, *buffers)

    return call(
        matmul_fp8,
        (expert_of_tile_N, used[None], w_scales_ELK, _whole(x_SA), _whole(w_EBA), x_scales_SK.T),
        buffers=[*_operand_buffers(4), plgpu.SMEM((4, ROWS), jnp.float32)],
        out=((num_slots, num_columns), dtype),
        interpret=interpret,
        programs=programs,
    )


def tgmm_fp8(
    x_AS: jax.Array,
    x_scales_AM: jax.Array,
    y_BS: jax.Array,
    y_scales_BM: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    num_experts: int,
    *,
    interpret: Any = None,
    programs: int = PROGRAMS,
) -> jax.Array:
    """The sum over an expert's slots of x y^T: [E, A, B] float32; zeros for one without tiles.

    Args:
      x_AS: [A, slots] float8_e4m3fn, TILE_SIZE slots a tile.
      x_scales_AM: [A, blocks of slots] float32.
      y_BS, y_scales_BM: the same of B.
      expert_of_tile_N: [tiles] int32, ascending over the used ones.
      used: [] int32, the tiles that count; slots of others are not read.
      interpret, programs: as in `gmm_fp8`.
    Raises:
      ValueError: for what the kernels cannot take.
    """
    (num_rows, num_slots), num_columns = x_AS.shape, len(y_BS)
    num_tiles = len(expert_of_tile_N)
    _check(x_AS, y_BS)
    assert num_slots == num_tiles * TILE_SIZE, (num_slots, num_tiles)
    assert x_scales_AM.shape == (num_rows, num_tiles), x_scales_AM.shape
    assert y_scales_BM.shape == (num_columns, num_tiles), y_scales_BM.shape
    row_blocks, column_blocks = pl.cdiv(num_rows, ROWS), pl.cdiv(num_columns, COLUMNS)
    of_one_expert = row_blocks * column_blocks

    def matmul_fp8_weights(
        used_ref, first_ref, count_ref, x_ref, x_scales_ref, y_ref, y_scales_ref, out_ref, *buffers
    ):
        def block(index):
            expert = jax.lax.div(index, of_one_expert)
            within = jax.lax.rem(index, of_one_expert)
            row_block, column_block = place(within, row_blocks, column_blocks)
            rows, columns = span(row_block, ROWS), span(column_block, COLUMNS)
            first, count = first_ref[expert], count_ref[expert]

            def operands(step):
                tile = first + step
                slots = span(tile, TILE_SIZE)
                scales = x_scales_ref.at[tile, rows], y_scales_ref.at[tile, columns]
                return x_ref.at[rows, slots], y_ref.at[columns, slots], *scales

            def scales(step, start, row_scales, column_scales_ref):
                columns = column_scales_ref.at[start : start + PIECE]
                column_scales = _load(columns, 0)
                return _along(row_scales, 0) * _along(column_scales, 1)

            total = functools.partial(_total, scales, jnp.minimum(used_ref[0], 1))
            return Block(count, operands, total, out_ref.at[expert, rows, columns])

        make_blocks(num_experts * of_one_expert, block, *buffers)

    return call(
        matmul_fp8_weights,
        (
            used[None],
            *tiles_of_experts(expert_of_tile_N, used, num_experts),
            x_AS,
            x_scales_AM.T,
            y_BS,
            y_scales_BM.T,
        ),
        buffers=[
            *_operand_buffers(3),
            plgpu.SMEM((3, ROWS), jnp.float32),
            plgpu.SMEM((3, COLUMNS), jnp.float32),
        ],
        out=((num_experts, num_rows, num_columns), jnp.float32),
        interpret=interpret,
        programs=programs,
    )


def _whole(x):
    """With zeros up to whole blocks of the last dim: copies cut no row that memory swizzles."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % SCALED)])


def _total(scales, once, for_each_step, half):
    """The sum of all steps, each times its scales, in pieces.

    Args:
      scales: (step, first column, scales of rows, the other operands' blocks) -> those of a piece.
      once: 1, which the compiler must not know.
    """

    def step(i, operands, totals):
        a_ref, b_ref, row_scales_ref, *others = operands
        row_scales = _load(row_scales_ref.at[half], 1)

        def add(start, total):
            def multiply(sum_ref):
                plgpu.wgmma(
                    sum_ref, a_ref.at[half], b_ref.at[start : start + PIECE].transpose((1, 0))
                )
                return sum_ref[...]

            product = pl.run_scoped(
                multiply, plgpu.WGMMAAccumulatorRef((ROWS_EACH, PIECE), jnp.float32)
            )
            return total + product * scales(i, start, row_scales, *others)

        # Between loops the compiler moves nothing. It would start to multiply the next piece before
        # it has added this one, and be short of registers.
        totals = tuple(
            jax.lax.fori_loop(0, once, lambda _, total, i=i: add(i * PIECE, total), total)
            for i, total in enumerate(totals)
        )
        plgpu.commit_smem()  # what was read here comes before the copy of the next scales
        return totals

    zeros = plgpu.layout_cast(jnp.zeros((ROWS_EACH, PIECE), jnp.float32), plgpu.Layout.WGMMA)
    return for_each_step(step, (zeros,) * (COLUMNS // PIECE))


def _load(ref, reduced):
    """The values for rows (reduced 1) or columns (0) of a piece, where its elements are."""
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(reduced))


def _along(scales, dim):
    return jax.lax.broadcast_in_dim(scales, (ROWS_EACH, PIECE), (dim,))


def _operand_buffers(steps_ahead):
    return [swizzled((steps_ahead, side, SCALED), FORMAT) for side in (ROWS, COLUMNS)]


def obstacle(dims: Sequence[int]) -> str | None:
    """Why the kernels cannot run on the mesh's devices with these dims; None if they can."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "gpu" and not HOPPER.search(device.device_kind):
        return f"are for Hopper GPUs, not for {device.device_kind}"
    if any(dim % DIMS for dim in dims):
        return f"take dims that are multiples of {DIMS}, not {dims}"
    return None


def _check(x, w):
    problem = obstacle(sorted({*x.shape[-2:], *w.shape[-2:]}))
    if problem:
        raise UserError(f"the GPU's kernels for products of FP8 {problem}")
    assert x.dtype == w.dtype == FORMAT, (x.dtype, w.dtype)
