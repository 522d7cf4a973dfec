"""How often the loops of a compiled program run, where the program says so.

Where `known_trip_count` is not written at a loop, the count follows from its condition: it compares
an element of the loop's state, which starts at a constant and grows by one, with a bound that is
constant too. Any of these may hide in fusions and copies, or reach the loop through those around
it.
"""

import re
from typing import NamedTuple

from moe_jax.planning.hlo import Computation, Instruction, Program

# What hands on its first operand's value.
_SAME = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"}


class Frame(NamedTuple):
    """A computation and the instruction that runs it, in the frame of its own."""

    computation: Computation
    instruction: Instruction | None = None
    caller: "Frame | None" = None


class State(NamedTuple):
    """An element of a loop's state: the loop's frame, and the index in the tuple."""

    frame: Frame
    index: int


def known_trips(program: Program, loop: Instruction, frame: Frame) -> int | None:
    """How often a `while` in this frame runs its body; None if that is not known beforehand."""
    written = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.config)
    if written:
        return int(written[1])
    condition = _callee(program, loop, frame, "condition")
    compared = _operation(program, condition, condition.computation.root.name, "compare")
    if compared is None:
        return None
    frame_of_compare, compare = compared
    counter, bound = (_trace(program, frame_of_compare, name) for name in compare.operands)
    bound = _constant(program, bound)
    if not isinstance(counter, State) or bound is None or "direction=LT" not in compare.attributes:
        return None
    start = _constant(program, _trace(program, frame, loop.operands[0], counter.index))
    step = _step(program, loop, frame, counter.index)
    return None if start is None or step is None else max(0, -(-(bound - start) // step))


def _step(program: Program, loop: Instruction, frame: Frame, index: int) -> int | None:
    """What the body adds to an element of the state."""
    body = _callee(program, loop, frame, "body")
    root = body.computation.root
    if root.opcode != "tuple":
        return None
    added = _operation(program, body, root.operands[index], "add")
    if added is None:
        return None
    values = [_trace(program, added[0], name) for name in added[1].operands]
    steps = [value for value in values if isinstance(value, int)]
    own = [value for value in values if isinstance(value, State) and value.index == index]
    return steps[0] if steps and own else None


def _constant(program: Program, value: int | State | None) -> int | None:
    """A traced value that no turn of a loop changes."""
    while isinstance(value, State):
        loop, caller = value.frame.instruction, value.frame.caller
        assert loop is not None and caller is not None
        body = _callee(program, loop, caller, "body")
        after = _trace(program, body, body.computation.root.name, value.index)
        if not isinstance(after, State) or after.index != value.index:
            return None
        value = _trace(program, caller, loop.operands[0], value.index)
    return value


def _trace(
    program: Program, frame: Frame, name: str, index: int | None = None
) -> int | State | None:
    """Where a value comes from: a number, an element of a loop's state, or neither.

    Args:
      index: the element of a tuple that is meant.
    """
    instruction = frame.computation.instructions[name]
    opcode = instruction.opcode
    if opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
        return int(instruction.literal)
    if opcode in _SAME:
        return _trace(program, frame, instruction.operands[0], index)
    if opcode == "tuple" and index is not None:
        return _trace(program, frame, instruction.operands[index])
    if opcode == "get-tuple-element" and index is None:
        place = int(instruction.attribute("index") or 0)
        return _trace(program, frame, instruction.operands[0], place)
    if opcode in ("fusion", "call") and index is None:
        inner = _callee(program, instruction, frame)
        return _trace(program, inner, inner.computation.root.name)
    if opcode == "parameter" and frame.instruction is not None and frame.caller is not None:
        if frame.instruction.opcode == "while":
            return None if index is None else State(frame, index)
        if frame.instruction.opcode in ("fusion", "call"):
            operand = frame.instruction.operands[int(instruction.literal)]
            return _trace(program, frame.caller, operand, index)
    return None


def _operation(
    program: Program, frame: Frame, name: str, opcode: str
) -> tuple[Frame, Instruction] | None:
    """The instruction of this kind that a value is the result of, perhaps in a fusion."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode == opcode:
        return frame, instruction
    if instruction.opcode in _SAME:
        return _operation(program, frame, instruction.operands[0], opcode)
    if instruction.opcode in ("fusion", "call"):
        inner = _callee(program, instruction, frame)
        return _operation(program, inner, inner.computation.root.name, opcode)
    return None


def _callee(
    program: Program, instruction: Instruction, frame: Frame, attribute: str | None = None
) -> Frame:
    names = (attribute,) if attribute else ("calls", "to_apply")
    name = next(name for name in map(instruction.attribute, names) if name)
    return Frame(program.computations[name], instruction, frame)
