"""Products of the rows of tiles with the matrices of their experts: Pallas kernels for TPU.

A tile is a block of rows that belong to one expert. The tiles of an expert lie side by side, so
its matrix is loaded once for each block of columns as long as all rows of it fit. Unused tiles are
skipped: their steps load nothing, compute nothing and write nothing.

Shapes: S slots = N tiles of `size` slots, E experts, A and B the dims of an expert's matrix, V
visits to experts.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# What blocks may take of the VMEM of one core: 64 MiB on v5p and v7x, 128 MiB on v5e and v6e.
VMEM_OF_BLOCKS = 48 * 2**20
VMEM_LIMIT = 60 * 2**20
# In the time that a byte takes from HBM: 166 on v5p, 312 on v7x, 560 on v6e.
OPERATIONS_OF_BYTE = 560
TOO_SMALL = re.compile(r"TPU v[234]\b")  # 16 MiB of VMEM


def obstacle() -> str | None:
    """Why the kernels cannot run on the mesh's devices; None if they can."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and TOO_SMALL.match(device.device_kind):
        return f"need more VMEM than a {device.device_kind} has"
    return None


def gmm(
    x_SA: jax.Array,
    w_EAB: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    *,
    transpose_weights: bool = False,
    interpret: Any = False,
) -> jax.Array:
    """Each tile's rows times the matrix of its expert: [S, B] in x's dtype, float32 sums.

    Args:
      x_SA: [slots, A].
      w_EAB: [experts, A, B] in x's dtype; [experts, B, A] if `transpose_weights`.
      expert_of_tile_N: [tiles] int32, ascending over the used ones.
      used: [] int32, tiles in use, the first ones. What the result has in others is undefined.
      interpret: runs the kernel on a CPU, as `pallas_call` has it.
    """
    slots, dim_a = x_SA.shape
    num_experts, num_tiles = len(w_EAB), len(expert_of_tile_N)
    size = slots // num_tiles
    dim_b = w_EAB.shape[1 if transpose_weights else 2]
    item = x_SA.dtype.itemsize

    def vmem(a, b):  # the next blocks are loaded beside those in use
        return 2 * item * (size * a + a * b + size * b) + 4 * size * b

    def traffic(a, b):
        loads = num_experts if a == dim_a else num_tiles
        return item * (slots * dim_a * pl.cdiv(dim_b, b) + (loads * dim_a + slots) * dim_b)

    # Summed whole, or in steps so long that adding up takes little.
    sizes_a = [a for a in _block_sizes(dim_a) if dim_a % a == 0 and a >= min(dim_a, 512)]
    a, b = choose_blocks(x_SA.shape, dim_b, sizes_a, _block_sizes(dim_b), vmem, traffic)
    steps_a = dim_a // a

    # A skipped step stays where the last one was.
    def place(n, i, used_ref):
        skipped = n >= used_ref[0]
        last = jnp.maximum(used_ref[0] - 1, 0)
        return jnp.where(skipped, last, n), jnp.where(skipped, steps_a - 1, i)

    def x_block(j, n, i, expert_ref, used_ref):
        return place(n, i, used_ref)

    def w_block(j, n, i, expert_ref, used_ref):
        n, i = place(n, i, used_ref)
        return (expert_ref[n], j, i) if transpose_weights else (expert_ref[n], i, j)

    def y_block(j, n, i, expert_ref, used_ref):
        return place(n, i, used_ref)[0], j

    def kernel(expert_ref, used_ref, x_ref, w_ref, y_ref, sum_ref):
        i = pl.program_id(2)

        @pl.when(pl.program_id(1) < used_ref[0])
        def _():
            product = _dot(x_ref[...], w_ref[0], 1, 1 if transpose_weights else 0)
            sum_ref[...] = product + jnp.where(i == 0, 0.0, sum_ref[...])

            @pl.when(i == steps_a - 1)
            def _():
                y_ref[...] = sum_ref[...].astype(y_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(dim_b, b), num_tiles, steps_a),
            in_specs=[
                pl.BlockSpec((size, a), x_block),
                pl.BlockSpec((1, b, a) if transpose_weights else (1, a, b), w_block),
            ],
            out_specs=pl.BlockSpec((size, b), y_block),
            scratch_shapes=[pltpu.VMEM((size, b), jnp.float32)],
        ),
        out_shape=result_like(x_SA, (slots, dim_b), x_SA.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * slots * dim_a * covered(dim_b, b),
            bytes_accessed=traffic(a, b),
            transcendentals=0,
        ),
        name="grouped_matmul",
        interpret=interpret,
    )(expert_of_tile_N, used.reshape(1), x_SA, w_EAB)


def tgmm(
    x_SA: jax.Array,
    y_SB: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    num_experts: int,
    *,
    interpret: Any = False,
) -> jax.Array:
    """x^T y over the tiles of each expert: [E, A, B] float32.

    An expert without tiles gets zeros.

    Args:
      x_SA, y_SB: [slots, A] and [slots, B], of one dtype.
      expert_of_tile_N, used, interpret: as for `gmm`.
    """
    (slots, dim_a), dim_b = x_SA.shape, y_SB.shape[1]
    num_tiles = len(expert_of_tile_N)
    size = slots // num_tiles
    item = x_SA.dtype.itemsize

    def vmem(a, b):
        return 2 * item * size * (a + b) + 2 * 4 * a * b

    def traffic(a, b):
        reads = slots * dim_a * pl.cdiv(dim_b, b) + slots * dim_b * pl.cdiv(dim_a, a)
        return item * reads + 4 * num_experts * dim_a * dim_b

    a, b = choose_blocks(x_SA.shape, dim_b, _block_sizes(dim_a), _block_sizes(dim_b), vmem, traffic)
    visits = make_visits(expert_of_tile_N, used, num_experts)

    def kernel(expert_ref, tile_ref, empty_ref, x_ref, y_ref, sum_ref):
        v = pl.program_id(2)

        @pl.when((v == 0) | (expert_ref[v] != expert_ref[jnp.maximum(v - 1, 0)]))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(empty_ref[v] == 0)
        def _():
            sum_ref[0] += _dot(x_ref[...], y_ref[...], 0, 0)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(dim_b, b), pl.cdiv(dim_a, a), num_tiles + num_experts),
            in_specs=[
                pl.BlockSpec((size, a), lambda j, i, v, expert, tile, empty: (tile[v], i)),
                pl.BlockSpec((size, b), lambda j, i, v, expert, tile, empty: (tile[v], j)),
            ],
            out_specs=pl.BlockSpec(
                (1, a, b), lambda j, i, v, expert, tile, empty: (expert[v], i, j)
            ),
        ),
        out_shape=result_like(x_SA, (num_experts, dim_a, dim_b), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * slots * covered(dim_a, a) * covered(dim_b, b),
            bytes_accessed=traffic(a, b),
            transcendentals=0,
        ),
        name="grouped_matmul_weights",
        interpret=interpret,
    )(*visits, x_SA, y_SB)


def make_visits(
    expert_of_tile_N: jax.Array, used: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Expert and tile of each visit, and whether it is empty: [N + E] int32 each.

    An expert is visited once for each of its tiles, and once if it has none, so that zeros are
    written. An empty visit stays at the tile of the one before, and those left over at the last
    expert.
    """
    num_tiles = len(expert_of_tile_N)
    in_use_N1 = jnp.arange(num_tiles)[:, None] < used
    of_expert_NE = expert_of_tile_N[:, None] == jnp.arange(num_experts)
    count_E = jnp.sum(in_use_N1 & of_expert_NE, axis=0, dtype=jnp.int32)
    end_E = jnp.cumsum(jnp.maximum(count_E, 1))
    visit_V1 = jnp.arange(num_tiles + num_experts, dtype=jnp.int32)[:, None]
    expert_V = jnp.sum(visit_V1 >= end_E[:-1], axis=1, dtype=jnp.int32)
    place_V = visit_V1[:, 0] - (end_E - jnp.maximum(count_E, 1))[expert_V]
    filled_V = (place_V < count_E[expert_V]).astype(jnp.int32)
    tile_V = jnp.maximum(jnp.cumsum(filled_V) - 1, 0)
    return expert_V, tile_V, 1 - filled_V


def choose_blocks(
    shape_SA: tuple[int, ...],
    dim_b: int,
    sizes_a: list[int],
    sizes_b: list[int],
    vmem: Callable[[int, int], int],
    traffic: Callable[[int, int], int],
) -> tuple[int, int]:
    """The blocks of A and B that cost least of those that fit into VMEM.

    They cost operations or traffic, whichever takes longer. The two cores of a v5p share the
    blocks of B, so that an odd one takes the time of two.
    """
    slots, dim_a = shape_SA

    def cost(blocks):
        a, b = blocks
        operations = 2 * slots * covered(dim_a, a) * covered(dim_b, 2 * b)
        moved = traffic(a, b)
        return max(operations, OPERATIONS_OF_BYTE * moved), moved, -a

    pairs = itertools.product(sizes_a, sizes_b)
    return min((blocks for blocks in pairs if vmem(*blocks) <= VMEM_OF_BLOCKS), key=cost)


def _block_sizes(dim: int) -> list[int]:
    """Of blocks that split a dim into parts nearly alike, in whole rows of 128 lanes."""
    lanes = range(1, pl.cdiv(dim, 128) + 1)
    return sorted({min(dim, 128 * pl.cdiv(dim, 128 * parts)) for parts in lanes})


def covered(dim: int, block: int) -> int:
    return pl.cdiv(dim, block) * block


def _dot(x: jax.Array, y: jax.Array, dim_x: int, dim_y: int) -> jax.Array:
    """Summed over these dims, in float32."""
    dims = (((dim_x,), (dim_y,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def result_like(x: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """Varies over the mesh as x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
