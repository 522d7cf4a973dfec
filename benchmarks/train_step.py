"""The train step at one small shape: against its limit, its dense twin, and other code bases.

    python -m benchmarks.train_step [--dtype=bfloat16] [--peers=transformers] [--rounds=7]

Each contender runs in a process of its own, compiles, warms up and waits. Then they take turns,
one step each, so that what disturbs the machine disturbs all of them alike. Printed are medians
over the rounds, and of each round's ratio to the first contender.

Peers get virtual environments of their own under --environments, made on the first use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.shape import SHAPE, operations

HERE = Path(__file__).parent
OURS = {
    "ours": ["routed"],
    "ours, dense of equal active operations": ["dense"],
}
PEERS = {
    "transformers": {
        "packages": ["torch==2.13.*", "transformers==5.23.*", "numpy"],
        "script": HERE / "peers" / "transformers_step.py",
        "variants": {"grouped_mm, compiled": ["grouped_mm", "compiled"]},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peers", default="", help="comma-separated: " + ", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache/moe_jax/peers")
    flags = parser.parse_args()

    commands = {
        name: [sys.executable, "-m", "benchmarks.our_step", flags.dtype, *arguments]
        for name, arguments in OURS.items()
    }
    for peer in filter(None, flags.peers.split(",")):
        python = _environment(flags.environments / peer, PEERS[peer]["packages"])
        for variant, arguments in PEERS[peer]["variants"].items():
            commands[f"{peer}, {variant}"] = [
                python, str(PEERS[peer]["script"]), json.dumps(SHAPE), flags.dtype, *arguments,
            ]  # fmt: skip
    report(commands, flags.dtype, flags.rounds)


def report(commands: dict[str, list[str]], dtype: str, rounds: int) -> None:
    contenders = {}
    for name, command in commands.items():  # one compiles at a time
        contender = Contender(command)
        if contender.error:
            print(f"{name}: left out: {contender.error}")
        else:
            contenders[name] = contender
    rate = Contender([sys.executable, "-m", "benchmarks.our_step", dtype, "rate"])
    seconds = {name: [] for name in [*contenders, "rate"]}
    for _ in range(rounds):
        for name, contender in [*contenders.items(), ("rate", rate)]:
            seconds[name].append(contender.step())
    needed = operations()
    rates = [rate.facts["operations"] / s for s in seconds.pop("rate")]
    first = next(iter(seconds.values()))
    print(f"{dtype}, {needed / 1e9:.0f} G operations needed, {rounds} rounds; matrix rate "
          f"{statistics.median(rates) / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(f"{'':42} {'seconds':>8} {'ratio':>6} {'of rate':>7}")
    for name, values in seconds.items():
        ratio = statistics.median(v / f for v, f in zip(values, first, strict=True))
        share = statistics.median(needed / v / r for v, r in zip(values, rates, strict=True))
        print(f"{name:42} {statistics.median(values):8.3f} {ratio:6.2f} {share:7.2f}")


class Contender:
    """A process that says a line of facts when it is ready, and a time after each line it gets."""

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self._process.stdout.readline()
        self.error = "" if line else self._process.stderr.read().strip().splitlines()[-1]
        self.facts = json.loads(line) if line else {}

    def step(self) -> float:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def _environment(path: Path, packages: list[str]) -> str:
    python = str(path / "bin" / "python")
    if not os.path.exists(python):
        print(f"installing {', '.join(packages)} in {path}")
        venv.create(path, with_pip=True)
        index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *index, *packages], check=True)
    return python


if __name__ == "__main__":
    main()
