"""Products of sorted rows with their experts' matrices as loops over experts, for any platform.

They are what `grouped_matmul_tpu.py` and `grouped_matmul_gpu.py` have kernels for. Plain bfloat16
and float32 experts have a quicker loop of their own (`grouped_matmul.py`), which writes less.

Shapes: S slots in N tiles, E experts, A summed dim of the forward product, B its result's dim.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.ops import slots

LARGEST_PIECE = 1024


def gmm(
    x_SA: jax.Array,
    w_EAB: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    *,
    transpose_weights: bool = False,
) -> jax.Array:
    """Each tile's rows times its expert's matrix: see `grouped_kernels.RowsTimesWeights`."""
    size = len(x_SA) // len(expert_of_tile_N)
    summed, across = (1, 0) if transpose_weights else (0, 1)

    def expert(y_SB, inputs):
        w, first, count = inputs

        def piece(start, rows, y_SB):
            return write(y_SB, dot(read(x_SA, start, rows), w, 1, summed), start)

        return over_pieces(piece, y_SB, first, count, size, len(x_SA)), None

    y_SB = slots.zeros((len(x_SA), w_EAB.shape[1 + across]), x_SA.dtype, x_SA)
    per_expert = w_EAB, *_tiles_of_experts(expert_of_tile_N, used, len(w_EAB))
    return jax.lax.scan(expert, y_SB, per_expert)[0]


def tgmm(
    x_SA: jax.Array,
    y_SB: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    num_experts: int,
) -> jax.Array:
    """x^T y over each expert's tiles: see `grouped_kernels.RowsTimesRows`."""
    size = len(x_SA) // len(expert_of_tile_N)

    def expert(_, inputs):
        def piece(start, rows, total_AB):
            return total_AB + row_sum(read(x_SA, start, rows), read(y_SB, start, rows))

        none = slots.zeros((x_SA.shape[1], y_SB.shape[1]), jnp.float32, x_SA)
        first, count = inputs
        return None, over_pieces(piece, none, first, count, size, len(x_SA))

    tiles = _tiles_of_experts(expert_of_tile_N, used, num_experts)
    return jax.lax.scan(expert, None, tiles)[1]


def _tiles_of_experts(
    expert_of_tile_N: jax.Array, used: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """First tile and number of tiles of each expert: [E] int32 each."""
    here_NE = expert_of_tile_N[:, None] == jnp.arange(num_experts)
    here_NE &= jnp.arange(len(expert_of_tile_N))[:, None] < used
    count_E = jnp.sum(here_NE, axis=0, dtype=jnp.int32)
    return jnp.cumsum(count_E) - count_E, count_E


def over_pieces(
    function: Callable[[jax.Array, int, Any], Any],
    carry: Any,
    first: jax.Array,
    count: jax.Array,
    size: int,
    num_slots: int,
) -> Any:
    """carry = function(start, slots, carry) over pieces of `count` tiles from tile `first` on."""
    tiles = 1 << (min(LARGEST_PIECE, num_slots) // size).bit_length() - 1
    while tiles:
        number = count // tiles

        def body(i, carry, tiles=tiles, first=first):
            return function((first + i * tiles) * size, tiles * size, carry)

        with jax.named_scope(f"pieces_of_{tiles * size}"):  # for those who count what is compiled
            carry = jax.lax.fori_loop(0, number, body, carry)
        first, count = first + number * tiles, count % tiles
        tiles = 0 if tiles == 1 else max(1, tiles // 4)
    return carry


def dot(a: jax.Array, b: jax.Array, dim_a: int, dim_b: int) -> jax.Array:
    """Summed over these dims, in float32."""
    dims = (((dim_a,), (dim_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def row_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """[A, B] float32, the sum over rows of a times b: [rows, A] and [rows, B]."""
    # Over one dim, a CPU takes the left operand as it lies, which is slow; over two, it is turned
    # over first, which is quick where it need not be computed at the same time.
    a, b = jax.lax.optimization_barrier((a, b))
    a, b = (x.reshape(-1, math.gcd(8, len(x)), x.shape[1]) for x in (a, b))
    dims = (((0, 1), (0, 1)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def read(x: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, rows)


def write(x: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, piece.astype(x.dtype), start, axis=0)
