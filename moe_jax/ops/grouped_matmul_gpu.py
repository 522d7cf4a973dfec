"""Products of sorted rows with their experts' matrices on NVIDIA Hopper GPUs, as Pallas kernels.

Rows lie sorted by expert in whole tiles (`grouped_matmul.make_tiles`), so each block of the result
needs one expert's matrix and is an ordinary blocked product. A program stays on its processor and
takes one block after the other. One of its three warp groups copies blocks of both operands into
shared memory, several steps ahead and on across blocks of the result; the other two multiply, each
its half of the rows. Tiles past the last used one are on no program's list, so skewed routing and
empty experts cost nothing but what they need.

Dims are multiples of 64, but not of the blocks: copies read zeros outside of an array and write
nothing there.

Shapes: S slots in N tiles, E experts, A summed dim of the forward product, B its result's dim.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.config import UserError

TILE_SIZE = 128  # slots of a tile: the rows of one block
# A block of the result: the L2 cache could not feed the tensor cores for much smaller ones.
ROWS, COLUMNS = TILE_SIZE, 256
SUMMED = 64  # summed in one step: 128 bytes of a row
STEPS_AHEAD = 4  # as many pairs of blocks fit in shared memory, and the results on their way out
MULTIPLIERS = 2  # warp groups
ROWS_EACH = ROWS // MULTIPLIERS
ROW_BLOCKS_TOGETHER = 8  # made side by side, so that the L2 cache serves the columns they share
PROGRAMS = 132  # the processors of an H100 or H200
DIMS = 64  # what copies between global and shared memory can cut
HOPPER = re.compile(r"\bG?H\d")  # in the names of devices: H100, H200, GH200
# Of the 512 registers that a processor has for a thread of each warp group.
COPY_REGISTERS, MULTIPLY_REGISTERS = 40, 232


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
    column_blocks = pl.cdiv(num_columns, COLUMNS)

    def grouped_matmul(expert_of_tile_ref, used_ref, x_ref, w_ref, out_ref, *buffers):
        used = used_ref[0]

        def block(index):
            tile, column_block = _place(index, used, column_blocks)
            rows, columns = _span(tile, ROWS), _span(column_block, COLUMNS)
            expert = expert_of_tile_ref[tile]

            def operands(step):
                summed = _span(step, SUMMED)
                across = (columns, summed) if transpose_weights else (summed, columns)
                return x_ref.at[rows, summed], w_ref.at[expert, *across]

            return Block(pl.cdiv(num_summed, SUMMED), operands, out_ref.at[rows, columns])

        def multiply(sum_ref, x_ref, w_ref, half):
            w_ref = w_ref.transpose((1, 0)) if transpose_weights else w_ref
            plgpu.wgmma(sum_ref, x_ref.at[half], w_ref)

        _make_blocks(used * column_blocks, block, multiply, *buffers)

    w_block = (COLUMNS, SUMMED) if transpose_weights else (SUMMED, COLUMNS)
    return _call(
        grouped_matmul,
        (expert_of_tile_N, used[None], x_SA, w_EAB),
        blocks=((ROWS, SUMMED), w_block),
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
    row_blocks, column_blocks = pl.cdiv(num_rows, ROWS), pl.cdiv(num_columns, COLUMNS)
    of_one_expert = row_blocks * column_blocks
    here_NE = expert_of_tile_N[:, None] == jnp.arange(num_experts)
    here_NE &= jnp.arange(len(expert_of_tile_N))[:, None] < used
    count_E = jnp.sum(here_NE, axis=0, dtype=jnp.int32)
    first_E = jnp.cumsum(count_E) - count_E

    def grouped_matmul_weights(first_ref, count_ref, x_ref, y_ref, out_ref, *buffers):
        def block(index):
            expert = jax.lax.div(index, of_one_expert)
            within = jax.lax.rem(index, of_one_expert)
            row_block, column_block = _place(within, row_blocks, column_blocks)
            rows, columns = _span(row_block, ROWS), _span(column_block, COLUMNS)
            first, count = (ref[expert] * (TILE_SIZE // SUMMED) for ref in (first_ref, count_ref))

            def operands(step):
                slots = _span(first + step, SUMMED)
                return x_ref.at[slots, rows], y_ref.at[slots, columns]

            return Block(count, operands, out_ref.at[expert, rows, columns])

        def multiply(sum_ref, x_ref, y_ref, half):
            plgpu.wgmma(sum_ref, x_ref.at[:, half].transpose((1, 0)), y_ref)

        _make_blocks(num_experts * of_one_expert, block, multiply, *buffers)

    return _call(
        grouped_matmul_weights,
        (first_E, count_E, x_SA, y_SB),
        blocks=((SUMMED, ROWS), (SUMMED, COLUMNS)),
        out=((num_experts, num_rows, num_columns), jnp.float32),
        interpret=interpret,
        programs=programs,
    )


class Block(NamedTuple):
    """A block of the result.

    steps: of its sum.
    operands: step -> both operands' blocks in global memory.
    target: where it goes in global memory.
    """

    steps: jax.Array | int
    operands: Callable[[jax.Array], tuple[Any, Any]]
    target: Any


def _make_blocks(number, block, multiply, a_buffer, b_buffer, out_buffer, filled, free):
    """What each warp group of each program does.

    Step by step through all its blocks, the copying one fills the next of STEPS_AHEAD buffers once
    that is `free`, and the multiplying ones read it once it is `filled`.

    Args:
      number: of blocks.
      block: index -> Block.
      multiply: (sum, one operand's block, the other's, which of the rows) -> None; adds up.
    """
    group, program = jax.lax.axis_index("group"), jax.lax.axis_index("program")
    programs = jax.lax.axis_size("program")

    def for_each_block(function):
        """Calls function(block, steps of those before); returns the steps of all."""

        def body(i, done):
            current = block(program + i * programs)
            function(current, done)
            return done + current.steps

        turns = jax.lax.div(number - program + programs - 1, programs)
        return jax.lax.fori_loop(0, turns, body, jnp.int32(0))

    @pl.when(group == MULTIPLIERS)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        def until_free(step):
            plgpu.barrier_wait(free.at[jax.lax.rem(step, STEPS_AHEAD)])

        def copy(block, done):
            def step(i, _):
                slot = jax.lax.rem(done + i, STEPS_AHEAD)
                pl.when(done + i >= STEPS_AHEAD)(lambda: until_free(done + i))
                a, b = block.operands(i)
                plgpu.copy_gmem_to_smem(a, a_buffer.at[slot], filled.at[slot])
                plgpu.copy_gmem_to_smem(b, b_buffer.at[slot], filled.at[slot])

            jax.lax.fori_loop(0, block.steps, step, None)

        done = for_each_block(copy)
        # A barrier must not go while it is in use.
        last = jnp.maximum(done - STEPS_AHEAD, 0)
        jax.lax.fori_loop(last, done, lambda step, _: until_free(step), None)

    @pl.when(group < MULTIPLIERS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        half = _span(group, ROWS_EACH)

        def make(block, done):
            def sum_of_steps(sum_ref):
                def step(i, _):
                    slot = jax.lax.rem(done + i, STEPS_AHEAD)
                    plgpu.barrier_wait(filled.at[slot])
                    multiply(sum_ref, a_buffer.at[slot], b_buffer.at[slot], half)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])

                jax.lax.fori_loop(0, block.steps, step, None)
                return sum_ref[...]

            total = pl.run_scoped(
                sum_of_steps, plgpu.WGMMAAccumulatorRef((ROWS_EACH, COLUMNS), jnp.float32)
            )
            total = total.astype(out_buffer.dtype)
            width = out_buffer.shape[-1]
            for i, start in enumerate(range(0, COLUMNS, width)):
                part = slice(start, start + width)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last but one has left
                out_buffer[group, i % 2] = total[:, part]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_buffer.at[group, i % 2], block.target.at[half, part])

        for_each_block(make)
        plgpu.wait_smem_to_gmem(0)


def _call(body, inputs, *, blocks, out, interpret, programs):
    """The kernel on these inputs; its result varies over the mesh as they do together.

    Args:
      blocks: shapes of both operands' blocks.
      out: shape and dtype of the result.
    """
    *_, x, y = inputs
    _check(x.dtype, sorted({*x.shape[1:], *y.shape[1:]}))
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(*out),
        scratch_types=[
            *(_buffer((STEPS_AHEAD, *block), x.dtype) for block in blocks),
            _buffer((MULTIPLIERS, 2, ROWS_EACH, _swizzled(out[1])), out[1]),
            plgpu.Barrier(num_arrivals=2, num_barriers=STEPS_AHEAD),
            plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=STEPS_AHEAD),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=MULTIPLIERS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    # JAX does not track what varies through such a kernel.
    varying = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    result = kernel(*inputs)
    return jax.lax.pcast(result, tuple(sorted(varying)), to="varying") if varying else result


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


def _buffer(shape, dtype):
    """In shared memory, laid out so that tensor cores and copies meet no bank conflicts."""
    transforms = plgpu.TilingTransform((8, _swizzled(dtype))), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _swizzled(dtype):
    """Elements of the widest row that shared memory swizzles, 128 bytes."""
    return 128 // jnp.dtype(dtype).itemsize


def _place(index, row_blocks, column_blocks):
    return plgpu.planar_snake(index, (row_blocks, column_blocks), 0, ROW_BLOCKS_TOGETHER)


def _span(block, length):
    return pl.ds(block * length, length)
