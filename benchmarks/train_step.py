"""The train step at one small shape: against its limit, its dense twin, and other code bases.

    python -m benchmarks.train_step [--dtype=bfloat16] [--peers transformers maxtext] [--rounds=7]

Each contender runs in a process of its own, compiles, warms up and waits. Then they take turns,
one step each, so that what disturbs the machine disturbs all of them alike. Printed are medians
over the rounds: seconds, how many times as long as our routed step, and the share of the machine's
matrix rate that the operations needed are. Routing is real: each router as it starts, on random
tokens.

Peers get virtual environments of their own under --environments, made on the first use with the
Python that runs this. Each is there in its fastest settings, or in all with --all_variants.
MaxText needs Python 3.12. Its dropless exchange between devices has no form for CPU, so it is not
among its variants.
"""

import argparse
import dataclasses
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks import record
from benchmarks.contender import Contender

OURS = {"ours": "routed", "ours, dense of equal active operations": "dense"}


@dataclasses.dataclass(frozen=True)
class Peer:
    """Its packages, the module to run, and by variant that one's arguments behind the dtype."""

    packages: tuple[str, ...]
    module: str
    fastest: dict[str, tuple[str, ...]]
    others: dict[str, tuple[str, ...]]


PEERS = {
    "transformers": Peer(
        ("torch==2.13.*", "transformers==5.23.*", "numpy"),
        "benchmarks.peers.transformers_step",
        {"grouped_mm, compiled": ("grouped_mm", "compiled")},
        # Its batched_mm copies an expert's weights for each choice: 19 GB at this shape.
        {
            "grouped_mm": ("grouped_mm", "eager"),
            "eager experts": ("eager", "eager"),
            "eager experts, compiled": ("eager", "compiled"),
        },
    ),
    "maxtext": Peer(
        ("maxtext[tpu]==0.2.5",),  # without an extra it has no dependencies
        "benchmarks.peers.maxtext_step",
        {"dropping": ("dropping",), "dropless, every expert": ("dense",)},
        {"dropless, ragged_dot": ("ragged",)},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=[])
    parser.add_argument("--all_variants", action="store_true", help="of peers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache/moe_jax/peers")
    flags = parser.parse_args()

    ours = (sys.executable, "benchmarks.our_step", flags.dtype)
    contenders = {name: Contender(*ours, kind) for name, kind in OURS.items()}
    for name in flags.peers:
        peer = PEERS[name]
        variants = peer.fastest | (peer.others if flags.all_variants else {})
        try:
            python = _environment(flags.environments / name, peer.packages)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: left out: {error}")
            continue
        for variant, arguments in variants.items():
            try:
                contender = Contender(python, peer.module, flags.dtype, *arguments)
                contenders[f"{name}, {variant}"] = contender
            except RuntimeError as error:
                print(f"{name}, {variant}: left out: {error}")
    seconds, rates = measure(contenders, Contender(*ours, "rate"), flags.rounds)
    report(seconds, rates, contenders["ours"].facts["operations"], flags.dtype)
    facts = {name: contender.facts for name, contender in contenders.items()}
    record.save(flags.json, dtype=flags.dtype, facts=facts, seconds=seconds, rates=rates)


def measure(
    contenders: dict[str, Contender], product: Contender, rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each step by contender and round; operations per second of a matrix product."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rates = []
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender.turn())
        rates.append(product.facts["operations"] / product.turn())
    return seconds, rates


def report(seconds: dict[str, list[float]], rates: list[float], needed: float, dtype: str) -> None:
    rate = statistics.median(rates) / 1e9
    rounds = f"{len(rates)} rounds"
    print(f"{dtype}, {rounds}, {needed / 1e9:.0f} G operations a step, {rate:.0f} GFLOP/s")
    print(f"{'':40} {'seconds':>8} {'ratio':>6} {'of rate':>8}")
    for name, values in seconds.items():
        ratio = statistics.median(v / o for v, o in zip(values, seconds["ours"], strict=True))
        share = statistics.median(needed / v / r for v, r in zip(values, rates, strict=True))
        print(f"{name:40} {statistics.median(values):8.3f} {ratio:6.2f} {share:8.2f}")


def _environment(path: Path, packages: tuple[str, ...]) -> str:
    """The Python of an environment with these packages; made if it is not there."""
    python = str(path / "bin" / "python")
    if not path.exists():
        print(f"installing {', '.join(packages)} in {path}")
        venv.create(path, with_pip=True)
        try:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(path)  # half an environment would be taken for a whole one
            raise
    return python


if __name__ == "__main__":
    main()
