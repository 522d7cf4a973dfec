"""The text of a compiled program, `compiled.as_text()`, as computations made of instructions.

Only what counting needs is read. The three compilers (CPU, TPU, GPU) write one grammar:

    %computation (parameters) -> type {
      %name = type opcode(operands), attribute=..., metadata={op_name="..."}, backend_config=...
      ROOT %name = ...
    }
"""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Array(NamedTuple):
    """An array of a result's type."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.findall(r"\d+", self.dtype)[0])  # bf16, s32, f8e4m3fn
        return math.prod(self.dims) * bits / 8


class Instruction(NamedTuple):
    """One line of a computation.

    arrays: of the result, those of a tuple in order.
    operands: names in the same computation.
    literal: what stands between the parentheses, as it stands there.
    attributes: what follows them, without `backend_config`.
    config: `backend_config`, as it stands there.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    config: str

    @property
    def op_name(self) -> str:
        """The operation of the program that this comes from, with its named scopes."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """The text of an attribute up to the next one; of a computation, its name."""
        found = re.search(rf"\b{name}=(\{{.*?\}}(?=,|$)|[^,]*)", self.attributes)
        return found[1].lstrip("%") if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"-?\d+", self.attribute(name) or ""))


class Computation(NamedTuple):
    """Instructions in the order of the text, which is the schedule where the program has one."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation, or a line cannot be read.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = None
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name, instructions, root = head[2], {}, None
            entry = name if head[1] else entry
        elif line.startswith("}") and name is not None:
            assert root is not None, name
            computations[name] = Computation(name, instructions, root)
            name = None
        elif name is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3])
            instructions[instruction.name] = instruction
            root = instruction if found[1] else root
    if entry is None:
        raise ValueError("the text has no ENTRY computation: is it of a compiled program?")
    return Program(computations, computations[entry])


def _instruction(name: str, text: str) -> Instruction:
    text = re.sub(r"/\*.*?\*/", "", text)
    type_end = _close(text, 0) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[type_end:].lstrip().partition("(")
    end = _close(rest, -1)
    attributes, _, config = rest[end:].partition(", backend_config=")
    arrays = tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(text[:type_end])
    )
    literal = rest[: end - 1]
    operands = () if opcode == "constant" else tuple(re.findall(r"%([\w.-]+)", literal))
    return Instruction(name, opcode, arrays, operands, literal, attributes, config)


def _close(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start` (-1: one before the text)."""
    depth = 1
    for place in range(start + 1, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")
