"""Blocks of a product on NVIDIA Hopper GPUs: which warp group does what, in Pallas kernels.

A program stays on its processor and makes one block of the result after the other. One of its three
warp groups copies blocks of the operands into shared memory, several steps ahead and on across
blocks of the result; the other two multiply, each its half of the rows.

Dims are multiples of 64, but not of the blocks: copies read zeros outside of an array and write
nothing there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# A block of the result: the L2 cache could not feed the tensor cores for much smaller ones.
ROWS, COLUMNS = 128, 256
MULTIPLIERS = 2  # warp groups
ROWS_EACH = ROWS // MULTIPLIERS
ROW_BLOCKS_TOGETHER = 8  # made side by side, so that the L2 cache serves the columns they share
PROGRAMS = 132  # the processors of an H100 or H200
DIMS = 64  # what copies between global and shared memory can cut
SWIZZLED = 128  # bytes of the widest row that shared memory swizzles
# Of the 512 registers that a processor has for a thread of each warp group.
COPY_REGISTERS, MULTIPLY_REGISTERS = 40, 232


class Block(NamedTuple):
    """A block of the result.

    steps: of its sum.
    operands: step -> the operands' blocks in global memory.
    total: (for_each_step, which of the rows) -> its sum for those rows, in pieces of as many
      columns. `for_each_step(function, carry)` makes carry = function(step, operands' blocks in
      shared memory, carry) of every step.
    target: where it goes in global memory.
    """

    steps: jax.Array | int
    operands: Callable[[jax.Array], tuple[Any, ...]]
    total: Callable[[Callable[..., Any], Any], tuple[jax.Array, ...]]
    target: Any


def make_blocks(number, block, *buffers):
    """What each warp group of each program does.

    Step by step through all its blocks, the copying one fills the next of the buffers once that is
    `free`, and the multiplying ones read it once it is `filled`.

    Args:
      number: of blocks.
      block: index -> Block.
      buffers: those of each operand, the result's, and the barriers `filled` and `free`.
    """
    *operand_buffers, out_buffer, filled, free = buffers
    steps_ahead = operand_buffers[0].shape[0]
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
            plgpu.barrier_wait(free.at[jax.lax.rem(step, steps_ahead)])

        def copy(block, done):
            def step(i, _):
                slot = jax.lax.rem(done + i, steps_ahead)
                pl.when(done + i >= steps_ahead)(lambda: until_free(done + i))
                for source, buffer in zip(block.operands(i), operand_buffers, strict=True):
                    plgpu.copy_gmem_to_smem(source, buffer.at[slot], filled.at[slot])

            jax.lax.fori_loop(0, block.steps, step, None)

        done = for_each_block(copy)
        # A barrier must not go while it is in use.
        last = jnp.maximum(done - steps_ahead, 0)
        jax.lax.fori_loop(last, done, lambda step, _: until_free(step), None)

    @pl.when(group < MULTIPLIERS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        half = span(group, ROWS_EACH)

        def make(block, done):
            def for_each_step(function, carry):
                def step(i, carry):
                    slot = jax.lax.rem(done + i, steps_ahead)
                    plgpu.barrier_wait(filled.at[slot])
                    carry = function(i, [buffer.at[slot] for buffer in operand_buffers], carry)
                    plgpu.barrier_arrive(free.at[slot])
                    return carry

                return jax.lax.fori_loop(0, block.steps, step, carry)

            pieces = block.total(for_each_step, half)
            wide, width = COLUMNS // len(pieces), out_buffer.shape[-1]
            for i, start in enumerate(range(0, COLUMNS, width)):
                part = slice(start % wide, start % wide + width)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last but one has left
                out_buffer[group, i % 2] = pieces[start // wide][:, part].astype(out_buffer.dtype)
                plgpu.commit_smem()
                target = block.target.at[half, start : start + width]
                plgpu.copy_smem_to_gmem(out_buffer.at[group, i % 2], target)

        for_each_block(make)
        plgpu.wait_smem_to_gmem(0)


def call(body, inputs, *, buffers, out, interpret, programs):
    """The kernel on these inputs; its result varies over the mesh as they do together.

    Args:
      body: (inputs, result, what `make_blocks` wants as buffers) -> None, all in global memory.
      buffers: of each operand, blocks of so many steps ahead as fit in shared memory beside the
        results on their way out.
      out: shape and dtype of the result.
      interpret: None, or how to run on a CPU (`pallas.mosaic_gpu.InterpretGPUParams`).
      programs: that share the blocks out.
    """
    steps_ahead = buffers[0].shape[0]
    width = SWIZZLED // jnp.dtype(out[1]).itemsize
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(*out),
        scratch_types=[
            *buffers,
            swizzled((MULTIPLIERS, 2, ROWS_EACH, width), out[1]),
            plgpu.Barrier(num_arrivals=len(buffers), num_barriers=steps_ahead),
            plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=steps_ahead),
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


def swizzled(shape, dtype):
    """In shared memory, laid out so that tensor cores and copies meet no bank conflicts."""
    tiling = plgpu.TilingTransform((8, SWIZZLED // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(SWIZZLED)))


def place(index, row_blocks, column_blocks):
    return plgpu.planar_snake(index, (row_blocks, column_blocks), 0, ROW_BLOCKS_TOGETHER)


def span(block, length):
    return pl.ds(block * length, length)
