"""The largest buffers of a compiled program, from what XLA writes when it is told to dump.

It writes them also of a program that a device's memory cannot hold.
"""

import re
from pathlib import Path
from typing import NamedTuple

from moe_jax.planning import hlo

_VALUE = re.compile(
    r" value: <\d+ ([\w.-]+)(?:\{[\d,]*\})? @0> \(size=(\d+),offset=\d+\): (\w+\[[\d,]*\])"
)


class Buffer(NamedTuple):
    """shape: as XLA writes it, "f32[7168,129280]"; op_name: of the instruction that fills it, ""
    if the compiler has made it."""

    bytes: int
    shape: str
    op_name: str


def largest(folder: Path, number: int) -> list[Buffer]:
    """Of the largest program in a dump; of those of one shape, one."""
    assignments = folder.glob("*after_optimizations-buffer-assignment.txt")
    sizes = {file: file.stat().st_size for file in assignments}
    if not sizes:
        return []
    file = max(sizes, key=sizes.__getitem__)
    text = file.with_name(file.name.replace("-buffer-assignment", "")).read_text()
    names = {
        instruction.name: instruction.op_name
        for computation in hlo.parse(text).computations.values()
        for instruction in computation.instructions.values()
    }
    found: dict[tuple[int, str], Buffer] = {}
    for name, size, shape in _VALUE.findall(file.read_text()):
        buffer = Buffer(int(size), shape, names.get(name, ""))
        # Copies that the compiler makes have no name.
        if buffer.op_name or (buffer.bytes, shape) not in found:
            found[buffer.bytes, shape] = buffer
    return sorted(found.values(), reverse=True)[:number]
