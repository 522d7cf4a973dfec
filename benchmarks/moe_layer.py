"""The routed layer, forward and backward: many experts, meshes, skewed routing.

    python -m benchmarks.moe_layer [--sections flat meshes skew] [--rounds=7] [--json=PATH]

Each program runs in a process of its own, since the number of emulated devices is fixed when JAX
starts. They take turns, so that what disturbs the machine disturbs all alike; seconds are medians,
and ratios medians of a round's ratios. All have 16,384 tokens in all.

flat: on one device, 16, 64 and 256 experts of which a token has four. The router's own operations
grow with the experts; they are among those shown.

meshes: 8 emulated devices on the cores that one device has alone. Work is the operations of the
matrix products that the fullest device runs, relative to an eighth of one device's. The products
of experts loop over tiles that hold tokens, so they were counted from the tiles of this routing: 18
times the dims a row of a tile, padding of tiles with it, and 6 times the dims a token for the
router. Buffers beyond what routing fills cost no products, but travel: "sent" is rows of the
buffers a row that has to travel, a device's own counted in both.

skew: every routing runs in the same program, so it takes the same memory. Differences are the
largest from a dense loop over experts, as a share of the largest value.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

from benchmarks import record
from benchmarks.contender import Contender


@dataclasses.dataclass(frozen=True)
class Program:
    experts: int = 16
    fsdp: int = 1
    expert: int = 1
    buffer_factor: float = 1.5


@dataclasses.dataclass(frozen=True)
class Run:
    """A routing in a program.

    operations: of the fullest device, if all goes in one round.
    copies: how many devices a token travels to, its own counted.
    sent: rows of the buffers of one round a token.
    memory: of one device, temporary, in bytes.
    forward, gradient: largest differences from the reference, where it was run.
    """

    program: Program
    routing: str
    seconds: list[float]
    operations: int
    copies: float
    sent: float
    memory: int
    rounds: int
    dropped: int
    forward: float | None = None
    gradient: float | None = None

    def ratio(self, other: "Run") -> float:
        return statistics.median(
            mine / others for mine, others in zip(self.seconds, other.seconds, strict=True)
        )


Runs = dict[tuple[Program, str], Run]

ONE_DEVICE = Program()
FLAT = [Program(experts=experts) for experts in (16, 64, 256)]
MESHES = [
    Program(fsdp=8 // expert, expert=expert, buffer_factor=factor)
    for expert in (1, 2, 4, 8)
    for factor in (1.0, 1.5)
]
SKEWED = Program(fsdp=2, expert=4)
BALANCED = ("forced", "real")
EVERY = (*BALANCED, "one_expert", "zipf", "one_device")
SECTIONS = {
    "flat": [(program, BALANCED) for program in FLAT],
    "meshes": [(program, BALANCED) for program in (ONE_DEVICE, *MESHES)],
    "skew": [(SKEWED, EVERY)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()

    wanted: dict[Program, tuple[str, ...]] = {}
    for section in flags.sections:
        for program, routings in SECTIONS[section]:
            wanted[program] = max(wanted.get(program, ()), routings, key=len)
    runs = measure(wanted, flags.dtype, flags.rounds)
    versions = record.conditions()
    print(f"{flags.dtype}, {flags.rounds} rounds, jax {versions['jax']}, {versions['machine']}")
    print("forced: balance is forced; real: what a random router chooses for random tokens")
    for section in flags.sections:
        {"flat": report_flat, "meshes": report_meshes, "skew": report_skew}[section](runs)
    record.save(
        flags.json, dtype=flags.dtype, runs=[dataclasses.asdict(run) for run in runs.values()]
    )


def measure(wanted: dict[Program, tuple[str, ...]], dtype: str, rounds: int) -> Runs:
    contenders = {program: start(program, dtype, names) for program, names in wanted.items()}
    seconds = {(program, name): [] for program, names in wanted.items() for name in names}
    for _ in range(rounds):
        for (program, name), values in seconds.items():
            values.append(contenders[program].turn(name))
    runs = {}
    for (program, name), values in seconds.items():
        facts = contenders[program].facts
        routed = facts["routings"][name]
        runs[program, name] = Run(program, name, values, **facts["program"], **routed)
    return runs


def start(program: Program, dtype: str, routings: tuple[str, ...]) -> Contender:
    fields = [f"--{name}={value}" for name, value in dataclasses.asdict(program).items()]
    check = ["--check"] if program == SKEWED else []
    return Contender(
        sys.executable,
        "benchmarks.layer_run",
        f"--dtype={dtype}",
        *fields,
        "--routings",
        *routings,
        *check,
    )


def report_flat(runs: Runs) -> None:
    print("\nExperts, on one device            seconds wanted: at most 1.25 times those of 16")
    print(f"{'experts':>8} {'routing':10} {'operations':>10} {'seconds':>8} {'ratio':>6}")
    for routing in BALANCED:
        for program in FLAT:
            run, base = runs[program, routing], runs[FLAT[0], routing]
            print(
                f"{program.experts:8} {routing:10} {run.operations / 1e9:8.1f} G "
                f"{statistics.median(run.seconds):8.3f} {run.ratio(base):6.2f}"
            )


def report_meshes(runs: Runs) -> None:
    print("\n8 emulated devices          wanted: work at most 1.05, ratio of seconds at most 1.3")
    print(
        f"{'mesh':18} {'routing':8} {'factor':>6} {'rounds':>6} {'work':>6} {'sent':>6} "
        f"{'MiB':>6} {'seconds':>8} {'ratio':>6}"
    )
    for routing in BALANCED:
        base = runs[ONE_DEVICE, routing]
        for program in (ONE_DEVICE, *MESHES):
            run = runs[program, routing]
            devices = program.fsdp * program.expert
            work = run.operations * devices / base.operations
            sent = run.sent / run.copies
            mesh = "one device"
            if devices > 1:
                mesh = f"fsdp {program.fsdp}, expert {program.expert}"
            one_round = run.rounds == 1
            print(
                f"{mesh:18} {routing:8} {program.buffer_factor:6.1f} {run.rounds:6} "
                f"{f'{work:.3f}' if one_round else '-':>6} "
                f"{f'{sent:.2f}' if one_round and program.expert > 1 else '-':>6} "
                f"{run.memory / 2**20:6.0f} {statistics.median(run.seconds):8.3f} "
                f"{run.ratio(base):6.2f}"
            )


def report_skew(runs: Runs) -> None:
    mesh = f"fsdp {SKEWED.fsdp}, expert {SKEWED.expert}"
    print(f"\nSkew on {mesh}        wanted: dropped 0, differences of rounding, the same memory")
    print(
        f"{'routing':12} {'forward':>9} {'gradient':>9} {'dropped':>8} {'rounds':>6} {'MiB':>6} "
        f"{'seconds':>8} {'to forced':>9}"
    )
    for routing in EVERY:
        run, base = runs[SKEWED, routing], runs[SKEWED, "forced"]
        print(
            f"{routing:12} {run.forward:9.1e} {run.gradient:9.1e} {run.dropped:8} {run.rounds:6} "
            f"{run.memory / 2**20:6.0f} {statistics.median(run.seconds):8.3f} "
            f"{run.ratio(base):9.2f}"
        )


if __name__ == "__main__":
    main()
