"""Products of sorted rows with their experts' matrices on NVIDIA Hopper GPUs, as Pallas kernels.

Rows lie sorted by expert in whole tiles (`grouped_matmul.make_tiles`), so each block of the result
needs one expert's matrix and is an ordinary blocked product (`blocks_gpu`). Tiles past the last
used one are on no program's list, so skewed routing and empty experts cost nothing but what they
need.

Shapes: S slots in N tiles, E experts, A summed dim of the forward product, B its result's dim.
"""

import functools
import re
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

TILE_SIZE = ROWS  # slots of a tile: the rows of one block
SUMMED = 64  # summed in one step: 128 bytes of a row
STEPS_AHEAD = 4
HOPPER = re.compile(r"\bG?H\d")  # in the names of devices: H100, H200, GH200


def gmm(
    x_SA: jax.Array,
    w_EAB: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    *,
    transpose_weights: bool = False,
    interpret: Any = None,
    programs: int = PROGRAMS,
) -> jax.Array:
    """Each tile's rows times the matrix of its expert: [S, B] in x's dtype, summed in float32.

    Args:
      x_SA: [slots, A] bfloat16, TILE_SIZE slots a tile.
      w_EAB: [experts, A, B], or [experts, B, A] with `transpose_weights`; in x's dtype.
      expert_of_tile_N: [tiles] int32.
      used: [] int32, the tiles to compute; rows of others keep what was in memory.
      interpret: None, or how to run on a CPU (`pallas.mosaic_gpu.InterpretGPUParams`).
      programs: that share the blocks out.
    Raises:
      ValueError: for what the kernels cannot take.
    """
    num_slots, num_summed = x_SA.shape
    assert num_slots == len(expert_of_tile_N) * TILE_SIZE, (num_slots, len(expert_of_tile_N))
    num_columns = w_EAB.shape[1 if transpose_weights else 2]
    _check(x_SA.dtype, sorted({num_summed, num_columns, *w_EAB.shape[1:]}))
    column_blocks = pl.cdiv(num_columns, COLUMNS)

    def grouped_matmul(expert_of_tile_ref, used_ref, x_ref, w_ref, out_ref, *buffers):
        used = used_ref[0]

        def block(index):
            tile, column_block = place(index, used, column_blocks)
            rows, columns = span(tile, ROWS), span(column_block, COLUMNS)
            expert = expert_of_tile_ref[tile]

            def operands(step):
                summed = span(step, SUMMED)
                across = (columns, summed) if transpose_weights else (summed, columns)
                return x_ref.at[rows, summed], w_ref.at[expert, *across]

            total = functools.partial(_total, multiply)
            return Block(pl.cdiv(num_summed, SUMMED), operands, total, out_ref.at[rows, columns])

        def multiply(sum_ref, x_ref, w_ref, half):
            w_ref = w_ref.transpose((1, 0)) if transpose_weights else w_ref
            plgpu.wgmma(sum_ref, x_ref.at[half], w_ref)

        make_blocks(used * column_blocks, block, *buffers)

    blocks = (ROWS, SUMMED), (COLUMNS, SUMMED) if transpose_weights else (SUMMED, COLUMNS)
    return call(
        grouped_matmul,
        (expert_of_tile_N, used[None], x_SA, w_EAB),
        buffers=[swizzled((STEPS_AHEAD, *block), x_SA.dtype) for block in blocks],
        out=((num_slots, num_columns), x_SA.dtype),
        interpret=interpret,
        programs=programs,
    )


def tgmm(
    x_SA: jax.Array,
    y_SB: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    num_experts: int,
    *,
    interpret: Any = None,
    programs: int = PROGRAMS,
) -> jax.Array:
    """The sum over an expert's rows of x^T y: [E, A, B] float32; zeros for one without tiles.

    Args:
      x_SA: [slots, A] bfloat16, TILE_SIZE slots a tile.
      y_SB: [slots, B], in x's dtype.
      expert_of_tile_N: [tiles] int32, ascending over the used ones.
      used: [] int32, the tiles that count; rows of others are not read.
      interpret, programs: as in `gmm`.
    Raises:
      ValueError: for what the kernels cannot take.
    """
    num_slots, num_rows = x_SA.shape
    assert num_slots == len(expert_of_tile_N) * TILE_SIZE, (num_slots, len(expert_of_tile_N))
    num_columns = y_SB.shape[1]
    _check(x_SA.dtype, sorted({num_rows, num_columns}))
    row_blocks, column_blocks = pl.cdiv(num_rows, ROWS), pl.cdiv(num_columns, COLUMNS)
    of_one_expert = row_blocks * column_blocks

    def grouped_matmul_weights(first_ref, count_ref, x_ref, y_ref, out_ref, *buffers):
        def block(index):
            expert = jax.lax.div(index, of_one_expert)
            within = jax.lax.rem(index, of_one_expert)
            row_block, column_block = place(within, row_blocks, column_blocks)
            rows, columns = span(row_block, ROWS), span(column_block, COLUMNS)
            first, count = (ref[expert] * (TILE_SIZE // SUMMED) for ref in (first_ref, count_ref))

            def operands(step):
                slots = span(first + step, SUMMED)
                return x_ref.at[slots, rows], y_ref.at[slots, columns]

            total = functools.partial(_total, multiply)
            return Block(count, operands, total, out_ref.at[expert, rows, columns])

        def multiply(sum_ref, x_ref, y_ref, half):
            plgpu.wgmma(sum_ref, x_ref.at[:, half].transpose((1, 0)), y_ref)

        make_blocks(num_experts * of_one_expert, block, *buffers)

    return call(
        grouped_matmul_weights,
        (*tiles_of_experts(expert_of_tile_N, used, num_experts), x_SA, y_SB),
        buffers=[swizzled((STEPS_AHEAD, SUMMED, side), x_SA.dtype) for side in (ROWS, COLUMNS)],
        out=((num_experts, num_rows, num_columns), jnp.float32),
        interpret=interpret,
        programs=programs,
    )


def tiles_of_experts(
    expert_of_tile_N: jax.Array, used: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """The first used tile of each expert and their number: [E] int32 each."""
    here_NE = expert_of_tile_N[:, None] == jnp.arange(num_experts)
    here_NE &= jnp.arange(len(expert_of_tile_N))[:, None] < used
    count_E = jnp.sum(here_NE, axis=0, dtype=jnp.int32)
    return jnp.cumsum(count_E) - count_E, count_E


def _total(multiply, for_each_step, half):
    """The sum of multiply(sum, operands' blocks, which of the rows) of all steps, in one piece."""

    def sum_of_steps(sum_ref):
        def step(i, operands, _):
            multiply(sum_ref, *operands, half)
            plgpu.wgmma_wait(0)

        for_each_step(step, None)
        return sum_ref[...]

    return (
        pl.run_scoped(sum_of_steps, plgpu.WGMMAAccumulatorRef((ROWS_EACH, COLUMNS), jnp.float32)),
    )


def obstacle(dtype: Any, dims: Sequence[int]) -> str | None:
    """Why the kernels cannot take these operands on the mesh's devices; None if they can."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "gpu" and not HOPPER.search(device.device_kind):
        return f"are for Hopper GPUs, not for {device.device_kind}"
    if dtype != jnp.bfloat16:
        return f"take bfloat16, not {dtype}"
    if any(dim % DIMS for dim in dims):
        return f"take dims that are multiples of {DIMS}, not {dims}"
    return None


def _check(dtype, dims):
    problem = obstacle(dtype, dims)
    if problem:
        raise UserError(
            f"the kernels of config.model.backends.grouped_matmul='gpu' {problem};"
            " 'portable' takes anything"
        )
