"""What one device does in a compiled program: products, kernels and collectives, counted.

A walk over the text (`compiled.as_text()`) of a program compiled for CPU, TPU or GPU. It goes
through fusions, calls and loops; a loop's body counts as often as it runs, a conditional as its
largest branch. XLA's own `cost_analysis()` counts a loop's body once, and there is none for GPUs.

- A loop runs as often as the text says (`trips.py`). Where the data decide, the caller may expect a
  number by the loop's `op_name`; a loop for which nothing is expected counts as not run. So further
  rounds of dispatch count as nothing, and the first one, which stands outside, counts.
- A kernel (Pallas, cuDNN) is a custom call of which XLA sees no operation. The caller may count it
  by its name and the shapes of operands and results; otherwise it counts as its author declares
  (`pl.CostEstimate`), which only programs for TPU carry. Neither: it is listed as not counted.
- An asynchronous pair of start and done counts once.
- Bytes of products are those of their operands and results, whatever a cache may spare. Bytes of a
  collective are those that leave one device when no byte is sent twice: (n - 1) / n of what an
  all-to-all or reduce-scatter over n devices is given, n - 1 times an all-gather's part, twice a
  reduce-scatter's for an all-reduce.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.planning import hlo
from moe_jax.planning.hlo import Array, Instruction, Program
from moe_jax.planning.trips import Frame, known_trips

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Targets of custom calls that compute what XLA does not see.
KERNELS = re.compile(r"tpu_custom_call|triton|mosaic|cudnn|cublas|matmul")


class Product(NamedTuple):
    """A matrix product or a kernel. Counts are of one time.

    op_name: with named scopes; a kernel's ends in its name.
    operations: 2 for each multiplication and addition; None for a kernel that nobody counts.
    bytes: of operands and results.
    times: how often it runs.
    """

    op_name: str
    operations: float | None
    bytes: float
    times: float


class Collective(NamedTuple):
    """A collective. `bytes` leave one device each time; `group` devices take part."""

    kind: str
    op_name: str
    bytes: float
    group: int
    times: float
    asynchronous: bool


class Loop(NamedTuple):
    """A loop whose trips the data decide; `trips` is what the caller expects, None: nothing.

    times: how often it is come to.
    """

    op_name: str
    trips: float | None
    times: float


@dataclasses.dataclass
class Counts:
    """What one device does in a run of the program."""

    products: list[Product] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    loops: list[Loop] = dataclasses.field(default_factory=list)

    @property
    def operations(self) -> float:
        return sum((p.operations or 0) * p.times for p in self.products)

    @property
    def product_bytes(self) -> float:
        return sum(p.bytes * p.times for p in self.products)

    @property
    def not_counted(self) -> list[str]:
        """Kernels that neither the caller nor their author counts."""
        return [p.op_name for p in self.products if p.operations is None]

    def collective_bytes(self, kind: str) -> float:
        return sum(c.bytes * c.times for c in self.collectives if c.kind == kind)


class Run(NamedTuple):
    """An instruction, where it stands, how often it runs, and whether others go on meanwhile."""

    instruction: Instruction
    frame: Frame
    times: float
    asynchronous: bool


# The operations of a kernel, of its operands' and its results' shapes.
Kernel = Callable[[tuple[Array, ...], tuple[Array, ...]], float]


class Walk:
    """Counts parts of one program.

    Args:
      text: `compiled.as_text()`.
      expected_trips: by a regular expression that is searched for in a loop's op_name; of loops
        whose trips the data decide. The first that is found counts.
      kernels: by a regular expression that is searched for in a custom call's op_name.
    """

    def __init__(
        self,
        text: str,
        expected_trips: Mapping[str, float] | None = None,
        kernels: Mapping[str, Kernel] | None = None,
    ):
        self.program: Program = hlo.parse(text)
        self._expected_trips = expected_trips or {}
        self._kernels = kernels or {}

    def counts(self) -> Counts:
        """Of the whole program."""
        total = Counts()
        for run in self.runs():
            self._add(run, total)
        return total

    def counts_of(self, run: Run) -> Counts:
        """Of one run of an instruction and of all that it calls."""
        total = Counts()
        for inner in self._within(run._replace(times=1.0)):
            self._add(inner, total)
        return total

    def own_counts(self, run: Run) -> Counts:
        """Of an instruction without what it calls."""
        total = Counts()
        self._add(run, total)
        return total

    def runs(self) -> Iterator[Run]:
        """Every instruction that runs, inner ones behind those that call them."""
        return self._of_frame(Frame(self.program.entry), 1.0, False)

    def _of_frame(self, frame: Frame, times: float, asynchronous: bool) -> Iterator[Run]:
        for instruction in frame.computation.instructions.values():
            yield from self._within(Run(instruction, frame, times, asynchronous))

    def _within(self, run: Run) -> Iterator[Run]:
        yield run
        for callee, trips in self._callees(run.instruction, run.frame):
            asynchronous = run.asynchronous or run.instruction.opcode.endswith("-start")
            yield from self._of_frame(callee, run.times * trips, asynchronous)

    def _callees(self, instruction: Instruction, frame: Frame) -> Iterator[tuple[Frame, float]]:
        """What an instruction runs, and how often; of a conditional, the largest branch."""

        def inner(name: str) -> Frame:
            return Frame(self.program.computations[name.lstrip("%")], instruction, frame)

        if instruction.opcode == "while":
            trips = known_trips(self.program, instruction, frame)
            if trips is None:
                trips = self._expected(instruction) or 0.0
            yield inner(instruction.attribute("body") or ""), trips
        elif instruction.opcode == "conditional":
            names = re.findall(
                r"(?:branch_computations=\{|_computation=|, )(%[\w.-]+)", instruction.attributes
            )
            yield max((inner(name) for name in names), key=self._operations), 1.0
        elif instruction.opcode in ("call", "call-start"):
            # Started: how the libtpu of jax 0.12 hands a collective to the sparse cores.
            yield inner(instruction.attribute("to_apply") or ""), 1.0
        elif name := instruction.attribute("calls"):
            yield inner(name), 1.0
        elif name := instruction.attribute("called_computations"):
            # How that of jax 0.10 does so.
            yield inner(name.strip("{}").split(",")[0]), 1.0

    def _operations(self, frame: Frame) -> float:
        total = Counts()
        for run in self._of_frame(frame, 1.0, False):
            self._add(run, total)
        return total.operations

    def _expected(self, loop: Instruction) -> float | None:
        for pattern, trips in self._expected_trips.items():
            if re.search(pattern, loop.op_name):
                return trips
        return None

    def _add(self, run: Run, total: Counts) -> None:
        instruction, frame, times, asynchronous = run
        opcode = instruction.opcode
        if opcode == "while" and known_trips(self.program, instruction, frame) is None:
            total.loops.append(Loop(instruction.op_name, self._expected(instruction), times))
        operands = tuple(
            array
            for name in instruction.operands
            for array in frame.computation.instructions[name].arrays
        )
        kind, op_name = opcode.removesuffix("-start"), _op_name(instruction, frame)
        if kind == "all-reduce" and frame.computation.name.startswith("all-reduce-scatter"):
            # How programs for TPU write it: a fusion that keeps a part of the sum.
            kind = "reduce-scatter"
        if kind in COLLECTIVES:
            group = group_size(instruction.attributes)
            sent = sent_bytes(kind, operands, group)
            asynchronous |= opcode.endswith("-start")
            total.collectives.append(Collective(kind, op_name, sent, group, times, asynchronous))
        elif opcode in ("dot", "convolution", "custom-call"):
            operations = self._product_operations(instruction, operands)
            if operations != 0:
                moved = sum(array.bytes for array in (*operands, *instruction.arrays))
                total.products.append(Product(op_name, operations, moved, times))

    def _product_operations(
        self, instruction: Instruction, operands: tuple[Array, ...]
    ) -> float | None:
        """0: it is no product. None: it is a kernel that nobody counts."""
        if instruction.opcode == "dot":
            contracted = instruction.numbers("lhs_contracting_dims")
            return dot_operations(instruction.arrays[0], operands[0], contracted)
        if instruction.opcode == "convolution":
            return convolution_operations(instruction, *operands)
        for pattern, operations in self._kernels.items():
            if re.search(pattern, instruction.op_name):
                return operations(operands, instruction.arrays)
        if found := re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.config):
            return float(found[1]) or None
        if found := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.config):
            contracted = tuple(int(dim) for dim in re.findall(r"\d+", found[1]))
            return dot_operations(instruction.arrays[0], operands[0], contracted)
        target = instruction.attribute("custom_call_target") or ""
        return None if KERNELS.search(target) else 0


def _op_name(instruction: Instruction, frame: Frame) -> str:
    """An instruction that XLA has made may have none: then that of the fusion or loop around it."""
    while not instruction.op_name and frame.instruction is not None and frame.caller is not None:
        instruction, frame = frame.instruction, frame.caller
    return instruction.op_name


def dot_operations(result: Array, left: Array, contracted: tuple[int, ...]) -> float:
    """Two for each entry of the result and each contracted entry of the left operand."""
    return 2.0 * math.prod(result.dims) * math.prod(left.dims[dim] for dim in contracted)


def convolution_operations(instruction: Instruction, left: Array, kernel: Array) -> float:
    """Of a convolution, which is how products are written for TPU.

    A batch dim of a product may be spatial here, with a window in which all but one position falls
    into padding or between dilated entries; only positions that meet an entry count.
    """
    labels = instruction.attribute("dim_labels") or ""
    left_labels, kernel_labels, result_labels = re.split("_|->", labels)
    (result,) = instruction.arrays
    window = _window(instruction.attribute("window") or "")
    positions = 1
    for number in range(len(left_labels) - 2):
        positions *= _positions(
            left.dims[left_labels.index(str(number))],
            result.dims[result_labels.index(str(number))],
            *(window[field][number] for field in ("size", "stride", "pad", "lhs", "rhs")),
        )
    batch_groups = instruction.numbers("batch_group_count") or (1,)
    of_result = (
        result.dims[result_labels.index("b")] * result.dims[result_labels.index("f")]
    ) / batch_groups[0]
    return 2.0 * of_result * kernel.dims[kernel_labels.index("i")] * positions


def _window(text: str) -> dict[str, list[int]]:
    """The fields of {size=2x3 stride=1x2 pad=0_0x1_1 lhs_dilate=1x2}, absent ones filled in."""
    fields = dict(item.split("=") for item in text.strip("{}").split())
    rank = len(fields.get("size", "").split("x")) if fields else 0

    def numbers(name: str, default: int) -> list[int]:
        # Of padding, what stands in front.
        items = fields[name].split("x") if name in fields else [str(default)] * rank
        return [int(item.split("_")[0]) for item in items]

    return {
        "size": numbers("size", 1),
        "stride": numbers("stride", 1),
        "pad": numbers("pad", 0),
        "lhs": numbers("lhs_dilate", 1),
        "rhs": numbers("rhs_dilate", 1),
    }


@functools.cache
def _positions(
    left: int, result: int, size: int, stride: int, pad: int, left_dilation: int, dilation: int
) -> int:
    """How often a window of `size` meets an entry of the left operand, over the whole result."""
    if size == 1 and stride == 1 and pad == 0 and left_dilation == 1:
        return result
    starts = np.arange(result) * stride - pad
    met = 0
    for place in range(size):
        at = starts + place * dilation
        inside = (at >= 0) & (at <= (left - 1) * left_dilation) & (at % left_dilation == 0)
        met += int(np.count_nonzero(inside))
    return met


def group_size(attributes: str) -> int:
    """How many devices a collective's groups have; a permutation's have two."""
    # replica_groups={{0,1},{2,3}}, [2,4]<=[8], or mesh['x'=2,'y'=4] {'y'}; of an axis of the mesh,
    # a part may be meant: {'y':(1)2}
    if "source_target_pairs=" in attributes:
        return 2
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    raise ValueError(f"no replica groups: {attributes[:200]}")


def sent_bytes(kind: str, operands: tuple[Array, ...], group: int) -> float:
    """What leaves a device; see the head of this file."""
    if kind == "ragged-all-to-all":
        # How much travels, the data decide: as much as both buffers hold.
        given = min(array.bytes for array in operands[:2])
    elif kind in ("collective-permute", "collective-broadcast"):
        given = operands[0].bytes  # the others are the result's place
    else:
        given = sum(array.bytes for array in operands)
    if kind == "collective-permute":
        return given
    if kind == "all-gather":
        return given * (group - 1)
    return given * (group - 1) / group * (2 if kind == "all-reduce" else 1)
