"""The train step at one small shape: against its limit, its dense twin, and other code bases.

    python -m benchmarks.train_step [--dtype=bfloat16] [--peers=transformers] [--rounds=7]

Each contender runs in a process of its own, compiles, warms up and waits. Then they take turns,
one step each, so that what disturbs the machine disturbs all of them alike. Printed are medians
over the rounds: seconds, how many times as long as our routed step, and the share of the machine's
matrix rate that the operations needed are.

Peers get virtual environments of their own under --environments, made on the first use.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.contender import Contender

OURS = {"ours": "routed", "ours, dense of equal active operations": "dense"}
# By peer: its packages, and by variant the module to run and its arguments behind the dtype.
PEERS = {
    "transformers": (
        ["torch==2.13.*", "transformers==5.23.*", "numpy"],
        {"grouped_mm, compiled": ("benchmarks.peers.transformers_step", "grouped_mm", "compiled")},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache/moe_jax/peers")
    flags = parser.parse_args()

    ours = (sys.executable, "benchmarks.our_step", flags.dtype)
    contenders = {name: Contender(*ours, kind) for name, kind in OURS.items()}
    for peer in flags.peers:
        packages, variants = PEERS[peer]
        for variant, (module, *arguments) in variants.items():
            try:
                python = _environment(flags.environments / peer, packages)
                contender = Contender(python, module, flags.dtype, *arguments)
                contenders[f"{peer}, {variant}"] = contender
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{peer}, {variant}: left out: {error}")
    report(contenders, Contender(*ours, "rate"), flags.dtype, flags.rounds)


def report(contenders: dict[str, Contender], product: Contender, dtype: str, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rates = []
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender.turn())
        rates.append(product.facts["operations"] / product.turn())
    needed = contenders["ours"].facts["operations"]
    rate = statistics.median(rates) / 1e9
    print(f"{dtype}, {rounds} rounds, {needed / 1e9:.0f} G operations a step, {rate:.0f} GFLOP/s")
    print(f"{'':40} {'seconds':>8} {'ratio':>6} {'of rate':>8}")
    for name, values in seconds.items():
        ratio = statistics.median(v / o for v, o in zip(values, seconds["ours"], strict=True))
        share = statistics.median(needed / v / r for v, r in zip(values, rates, strict=True))
        print(f"{name:40} {statistics.median(values):8.3f} {ratio:6.2f} {share:8.2f}")


def _environment(path: Path, packages: list[str]) -> str:
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
