"""How much of each collective's time a compiled program fills with other work.

The text of a program for TPU or GPU is its schedule. Between the start and the done of an
asynchronous collective stand the products that run while bytes travel. Their time, at the chip's
stated bf16 rates, is held against the collective's own. What is no product counts as no time. Links
are taken to be otherwise idle, and collectives that are open at once share the same products.
"""

from typing import NamedTuple

from moe_jax.planning.compiled import Collective, Counts, Run, Walk
from moe_jax.planning.hlo import Instruction
from moe_jax.planning.machines import Machine
from moe_jax.planning.trips import Frame


class Overlap(NamedTuple):
    """A collective and the work between its start and its done, in seconds a run."""

    collective: Collective
    seconds: float
    work: float

    @property
    def share(self) -> float:
        """Of the collective's time that is filled."""
        return min(1.0, self.work / self.seconds) if self.seconds else 1.0


def overlaps(walk: Walk, machine: Machine) -> list[Overlap]:
    """Every collective that runs; one without start and done has no work beside it."""
    found = []
    for run in walk.runs():
        opcode = run.instruction.opcode
        if not run.times or run.asynchronous:
            continue
        if opcode.endswith("-done"):
            begin = _operand(run.instruction, run.frame)
            start = begin
            while not start.opcode.endswith("-start") and start.operands:
                start = _operand(start, run.frame)
            collectives = walk.counts_of(run._replace(instruction=start)).collectives
            work = _work_between(walk, run, begin.name, machine)
        elif opcode.endswith("-start"):
            continue
        else:
            collectives = walk.own_counts(run).collectives
            work = 0.0
        for collective in collectives:
            here = collective._replace(times=run.times)
            found.append(Overlap(here, here.bytes / machine.fast_links, work))
    return found


def seconds_of_products(counts: Counts, machine: Machine) -> float:
    """At the rate of the matrix units or of memory, whichever takes longer."""
    operations = machine.operations["bfloat16"]
    return sum(
        p.times * max((p.operations or 0.0) / operations, p.bytes / machine.memory_bandwidth)
        for p in counts.products
    )


def _work_between(walk: Walk, done: Run, begin: str, machine: Machine) -> float:
    names = list(done.frame.computation.instructions)
    between = names[names.index(begin) + 1 : names.index(done.instruction.name)]
    instructions = done.frame.computation.instructions
    return sum(
        seconds_of_products(walk.counts_of(done._replace(instruction=instructions[name])), machine)
        for name in between
    )


def _operand(instruction: Instruction, frame: Frame) -> Instruction:
    return frame.computation.instructions[instruction.operands[0]]
