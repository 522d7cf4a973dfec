"""Products of FP8 operands on TPU v7x, as Pallas kernels with DeepSeek-V3's scaling.

Both operands lie with the summed dim last and have a scale for each 128 of it. The matrix unit adds
up these 128, and the sum, times its scales, is added to the result in float32, in chunks that stay
in registers over the whole sum.

This saves bytes, not time. A matrix unit multiplies FP8 twice as fast as bfloat16, but 256 deep, so
that 128 leave it half empty. And for each sum of 128 the vector unit multiplies and adds once: at
four operations a cycle that alone takes as long as the whole product in bfloat16. Where columns
have scales of their own, as in `tgmm_fp8`, it multiplies twice. By the instructions of compiled
programs `gmm_fp8` takes at least 1.3 times as long as bfloat16, and `tgmm_fp8` 2.2 times.

Shapes: S slots = N tiles of `size` slots, E experts, A and B the dims of an expert's matrix; K, L
and M blocks of 128 of A, B and S.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.ops.grouped_matmul_tpu import (
    VMEM_LIMIT,
    VMEM_OF_BLOCKS,
    choose_blocks,
    covered,
    make_visits,
    result_like,
)

FORMAT = jnp.float8_e4m3fn
SCALED = 128  # values of the summed dim that share a scale
# A chunk of the result: half of the registers.
ROWS, COLUMNS = 128, 256
LANES = 128
# Chunks side by side in the program, so that one is multiplied while the one before is added up.
GMM_TOGETHER, TGMM_TOGETHER = 2, 8
KIND = "TPU7x"


def obstacle() -> str | None:
    """Why the kernels cannot run on the mesh's devices; None if they can."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "tpu" and device.device_kind != KIND:
        return f"are for {KIND}, not for {device.device_kind}, which multiplies no FP8"
    return None


def gmm_fp8(
    x_SA: jax.Array,
    x_scales_SK: jax.Array,
    w_EBA: jax.Array,
    w_scales_ELK: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    *,
    dtype: Any = jnp.bfloat16,
    interpret: Any = False,
) -> jax.Array:
    """Each tile's rows times the matrix of its expert: [S, B], summed in float32.

    Args:
      x_SA: [slots, A] float8_e4m3fn; a tile has a multiple of 128 slots.
      x_scales_SK: [slots, blocks of A] float32.
      w_EBA: [experts, B, A] float8_e4m3fn.
      w_scales_ELK: [experts, blocks of B, blocks of A] float32.
      expert_of_tile_N: [tiles] int32, ascending over the used ones.
      used: [] int32, tiles in use, the first ones. What the result has in others is undefined.
      dtype: of the result, bfloat16 or float32.
      interpret: runs the kernel on a CPU, as `pallas_call` has it.
    """
    slots, dim_a = x_SA.shape
    (num_experts, dim_b, _), num_tiles = w_EBA.shape, len(expert_of_tile_N)
    size, steps, scales_b = slots // num_tiles, pl.cdiv(dim_a, SCALED), pl.cdiv(dim_b, SCALED)
    assert x_SA.dtype == w_EBA.dtype == FORMAT, (x_SA.dtype, w_EBA.dtype)
    assert size % SCALED == 0, size
    assert x_scales_SK.shape == (slots, steps), x_scales_SK.shape
    assert w_scales_ELK.shape == (num_experts, scales_b, steps), w_scales_ELK.shape
    item = jnp.dtype(dtype).itemsize

    def vmem(a, b):  # the next blocks are loaded beside those in use
        return 2 * (size * a + a * b + item * size * b + 4 * steps * size)

    def traffic(a, b):
        return slots * dim_a * pl.cdiv(dim_b, b) + (num_experts * dim_a + item * slots) * dim_b

    # Half a tile is one, too.
    while vmem(dim_a, COLUMNS) > VMEM_OF_BLOCKS and size > ROWS:
        size, num_tiles, used = size // 2, num_tiles * 2, used * 2
        expert_of_tile_N = jnp.repeat(expert_of_tile_N, 2)
    _, b = choose_blocks(x_SA.shape, dim_b, [dim_a], _block_sizes(dim_b, COLUMNS), vmem, traffic)

    # A skipped step stays where the last one was.
    def place(n, used_ref):
        return jnp.minimum(n, jnp.maximum(used_ref[0] - 1, 0))

    def kernel(expert_ref, used_ref, x_ref, x_scales_ref, w_ref, w_scales_ref, y_ref):
        first_scale = pl.program_id(0) * (b // SCALED)

        # Turned over, so that the scales of rows lie along lanes: one register for all columns.
        def chunk(row, column):
            rows, columns = pl.ds(row, ROWS), pl.ds(column, COLUMNS)
            scale = [
                jnp.minimum(first_scale + (column + start) // SCALED, scales_b - 1)
                for start in range(0, COLUMNS, SCALED)
            ]
            sums = [jnp.zeros((SCALED, ROWS), jnp.float32) for _ in scale]
            for k in range(steps):
                summed = slice(k * SCALED, min((k + 1) * SCALED, dim_a))
                product = _dot(w_ref[0, columns, summed], x_ref[rows, summed])
                row_scales = x_scales_ref[pl.ds(k, 1), rows]
                for i, here in enumerate(scale):
                    part = product[i * SCALED : (i + 1) * SCALED]
                    sums[i] += part * (row_scales * w_scales_ref[0, here, k])
            y = jnp.concatenate([total.T for total in sums], axis=1)
            y_ref[rows, columns] = y.astype(y_ref.dtype)

        @pl.when(pl.program_id(1) < used_ref[0])
        def _():
            @pl.loop(0, size, step=ROWS)
            def _(row):
                @pl.loop(0, b, step=COLUMNS, unroll=GMM_TOGETHER)
                def _(column):
                    chunk(row, column)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(dim_b, b), num_tiles),
            in_specs=[
                pl.BlockSpec((size, dim_a), lambda j, n, expert, used: (place(n, used), 0)),
                pl.BlockSpec((steps, size), lambda j, n, expert, used: (0, place(n, used))),
                pl.BlockSpec(
                    (1, b, dim_a), lambda j, n, expert, used: (expert[place(n, used)], j, 0)
                ),
                pl.BlockSpec(
                    (1, scales_b, steps),
                    lambda j, n, expert, used: (expert[place(n, used)], 0, 0),
                    memory_space=pltpu.SMEM,
                ),
            ],
            out_specs=pl.BlockSpec((size, b), lambda j, n, expert, used: (place(n, used), j)),
        ),
        out_shape=result_like(x_SA, (slots, dim_b), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * slots * dim_a * covered(dim_b, b),
            bytes_accessed=traffic(dim_a, b),
            transcendentals=0,
        ),
        name="matmul_fp8",
        interpret=interpret,
    )(expert_of_tile_N, used.reshape(1), x_SA, x_scales_SK.T, w_EBA, w_scales_ELK)


def tgmm_fp8(
    x_AS: jax.Array,
    x_scales_AM: jax.Array,
    y_BS: jax.Array,
    y_scales_BM: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    num_experts: int,
    *,
    interpret: Any = False,
) -> jax.Array:
    """x y^T over the slots of each expert: [E, A, B] float32; zeros for one without tiles.

    Args:
      x_AS: [A, slots] float8_e4m3fn; a tile has a multiple of 128 slots.
      x_scales_AM: [A, blocks of slots] float32.
      y_BS, y_scales_BM: the same of B.
      expert_of_tile_N, used, interpret: as for `gmm_fp8`.
    """
    (dim_a, slots), dim_b = x_AS.shape, len(y_BS)
    num_tiles = len(expert_of_tile_N)
    size, steps = slots // num_tiles, slots // num_tiles // SCALED
    assert x_AS.dtype == y_BS.dtype == FORMAT, (x_AS.dtype, y_BS.dtype)
    assert size % SCALED == 0, size

    def by_tile(scales_DM):
        assert scales_DM.shape[1] == num_tiles * steps, scales_DM.shape
        return scales_DM.T.reshape(num_tiles, steps, -1)

    def vmem(a, b):
        return 2 * (size + 4 * steps) * (a + b) + 2 * 4 * a * b

    def traffic(a, b):
        reads = slots * dim_a * pl.cdiv(dim_b, b) + slots * dim_b * pl.cdiv(dim_a, a)
        return reads + 4 * num_experts * dim_a * dim_b

    sizes = _block_sizes(dim_a, ROWS), _block_sizes(dim_b, COLUMNS)
    a, b = choose_blocks((slots, dim_a), dim_b, *sizes, vmem, traffic)
    visits = make_visits(expert_of_tile_N, used, num_experts)

    def kernel(
        expert_ref,
        tile_ref,
        empty_ref,
        x_ref,
        x_scales_ref,
        y_ref,
        y_scales_ref,
        sum_ref,
        spread_ref,
    ):
        v = pl.program_id(2)

        @pl.when((v == 0) | (expert_ref[v] != expert_ref[jnp.maximum(v - 1, 0)]))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def chunk(rows, columns):
            total = sum_ref[0, rows, columns]
            for k in range(steps):
                summed = slice(k * SCALED, (k + 1) * SCALED)
                product = _dot(x_ref[rows, summed], y_ref[columns, summed])
                row_scales = jnp.concatenate([spread_ref[k]] * (COLUMNS // LANES), axis=1)
                total += product * y_scales_ref[0, k : k + 1, columns] * row_scales
            sum_ref[0, rows, columns] = total

        @pl.when(empty_ref[v] == 0)
        def _():
            @pl.loop(0, a, step=ROWS)
            def _(row):
                rows = pl.ds(row, ROWS)
                for k in range(steps):
                    spread_ref[k] = jnp.broadcast_to(
                        x_scales_ref[0, k : k + 1, rows], (LANES, ROWS)
                    ).T

                @pl.loop(0, b, step=COLUMNS, unroll=min(TGMM_TOGETHER, b // COLUMNS))
                def _(column):
                    chunk(rows, pl.ds(column, COLUMNS))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(dim_b, b), pl.cdiv(dim_a, a), num_tiles + num_experts),
            in_specs=[
                pl.BlockSpec((a, size), lambda j, i, v, expert, tile, empty: (i, tile[v])),
                pl.BlockSpec((1, steps, a), lambda j, i, v, expert, tile, empty: (tile[v], 0, i)),
                pl.BlockSpec((b, size), lambda j, i, v, expert, tile, empty: (j, tile[v])),
                pl.BlockSpec((1, steps, b), lambda j, i, v, expert, tile, empty: (tile[v], 0, j)),
            ],
            out_specs=pl.BlockSpec(
                (1, a, b), lambda j, i, v, expert, tile, empty: (expert[v], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((steps, ROWS, LANES), jnp.float32)],
        ),
        out_shape=result_like(x_AS, (num_experts, dim_a, dim_b), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * slots * covered(dim_a, a) * covered(dim_b, b),
            bytes_accessed=traffic(a, b),
            transcendentals=0,
        ),
        name="matmul_fp8_weights",
        interpret=interpret,
    )(*visits, x_AS, by_tile(x_scales_AM), y_BS, by_tile(y_scales_BM))


def _block_sizes(dim: int, chunk: int) -> list[int]:
    """Of blocks that split a dim into parts nearly alike, in whole chunks."""
    return sorted(
        {chunk * pl.cdiv(dim, chunk * parts) for parts in range(1, pl.cdiv(dim, chunk) + 1)}
    )


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
