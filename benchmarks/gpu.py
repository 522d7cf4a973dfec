"""One GPU on experts' products and on a train step: right first, then how fast.

    python -m benchmarks.gpu [--json=PATH] [--quick]

It takes less than 8 minutes on an H100. First, what the device computes is held against references,
with gradients; a failure makes the exit code 1. Then come this device's rate in a large bfloat16
product, grouped products at DeepSeek-V2-Lite's and V3's shapes beside torch's grouped product, and
a train step of V2-Lite's shape with a few layers beside the same model in transformers. Each is
measured with balance forced and with real routing. A floor is the operations needed, divided by
the measured rate; "of rate" is the floor's share of the time. Products in eight bits stand beside
bfloat16's at V3's shapes, dense and by experts, and a layer's step; `gpu_fp8.py` has their floors.

Each part is a process of its own with the whole device's memory, so one that fails or takes too
long is left out with a word. torch and transformers are used if --peer-python has them.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.contender import ROOT

SECONDS, SECONDS_OF_PART = 8 * 60, 4 * 60  # at most, of all parts and of one
GOALS = {"products": 0.75, "step": 0.45}


class Parts:
    """Runs the parts, and keeps what they say for the record."""

    def __init__(self, quick: bool):
        self.arguments = ["quick"] if quick else []
        self.results: dict[str, Any] = {}
        self._end = time.monotonic() + SECONDS

    def run(self, name: str, python: str, module: str, *arguments: str) -> Any:
        """What the part says; None, with a word printed, if it comes to nothing."""
        limit = max(1.0, min(SECONDS_OF_PART, self._end - time.monotonic()))
        # A part takes memory as it needs it, as a peer may be another user of the device.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        try:
            done = subprocess.run(
                [python, "-m", module, *arguments, *self.arguments],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=limit,
            )
            if done.returncode:
                raise RuntimeError(_last_error(done.stderr))
            self.results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            self.results[name] = {"left out": f"it was not done in {limit:.0f} seconds"}
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            self.results[name] = {"left out": str(error)}
        if "left out" in self.results[name]:
            print(f"{name}: left out: {self.results[name]['left out']}")
            return None
        return self.results[name]


def report_checks(checks: list[dict] | None) -> bool:
    """Prints each; whether all have passed."""
    for check in checks or []:
        outcome = "ok" if check["passed"] else "FAILED"
        if "allowed" in check:
            print(f"{outcome:6} {check['check']}: {check['error']:.1e} of {check['allowed']:.0e}")
        else:
            print(f"{outcome:6} {check['check']}: {check['error']}")
    return bool(checks) and all(check["passed"] for check in checks)


def report_products(ours: dict, torch: dict | None) -> None:
    rate = ours["rate"]
    print(f"\n{ours['device']}: {rate / 1e12:.1f} TFLOP/s in a large bfloat16 product")
    print(f"grouped products, milliseconds; goal: {GOALS['products']:.0%} of rate")
    head = ("floor", "ours", "of rate", "torch", "of rate")
    print(f"{'':34} {'':16} {'':15} " + " ".join(f"{word:>8}" for word in head))
    of_torch = {_key(r): r["seconds"] for r in torch["products"]} if torch else {}
    for result in ours["products"]:
        floor = result["operations"] / rate
        columns = [f"{floor * 1e3:8.3f}"]
        for seconds in (result["seconds"], of_torch.get(_key(result))):
            if seconds is not None:
                columns += [f"{seconds * 1e3:8.3f}", f"{floor / seconds:8.2f}"]
        print(
            f"{result['case']:34} {result['pass']:16} {result['routing']:15} " + " ".join(columns)
        )


def report_fp8(found: dict) -> bool:
    """Prints times beside floors; whether all checks have passed."""
    passed, rates = report_checks(found["checks"]), found["rates"]
    tera = {name: rate / 1e12 for name, rate in rates.items()}
    print(
        f"\n{tera['bf16']:.1f} TFLOP/s in bf16, {tera['fp8']:.1f} in FP8, {tera['copy']:.2f} TB/s; "
        "milliseconds, quantising and all"
    )
    head = ("bf16", "floor", "FP8", "floor", "quicker")
    print(f"{'':34} {'':16} " + " ".join(f"{word:>8}" for word in head))
    for time_ in found["times"]:
        seconds, floors = time_["seconds"], time_["floors"]
        columns = [1e3 * x for form in seconds for x in (seconds[form], floors[form])]
        cells = [f"{x:8.3f}" for x in columns] + [f"{seconds['bf16'] / seconds['auto']:8.2f}"]
        print(f"{time_['case']:34} {time_['pass']:16} " + " ".join(cells))
    return passed


def report_step(ours: dict, peers: dict[str, dict]) -> None:
    operations = ours["operations"]
    floor = operations / ours["rate"]
    print(f"\ntrain step of V2-Lite's shape, {ours['shape']}: {operations / 1e12:.2f} T operations")
    print(f"floor {floor:.4f} s at the measured rate; goal: MFU {GOALS['step']:.0%}")
    times = {f"ours, {routing}": seconds for routing, seconds in ours["seconds"].items()}
    times |= {name: peer["seconds"] for name, peer in peers.items()}
    print(f"{'':48} {'seconds':>8} {'tokens/s':>9} {'MFU':>5} {'of rate':>8}")
    for name, seconds in times.items():
        mfu = operations / seconds / ours["peak"]
        print(
            f"{name:48} {seconds:8.4f} {ours['tokens'] / seconds:9.0f} {mfu:5.2f}"
            f" {floor / seconds:8.2f}"
        )


def _last_error(text: str) -> str:
    """Its line; what libraries print behind it says less."""
    lines = text.strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["no output"])[-1]


def _key(result: dict) -> tuple[str, str, str]:
    return result["case"], result["routing"], result["pass"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--peer-python", default=sys.executable, help="has torch, transformers")
    flags = parser.parse_args()

    parts, here, peer = Parts(flags.quick), sys.executable, flags.peer_python
    passed = report_checks(parts.run("checks", here, "benchmarks.gpu_checks"))
    products = parts.run("products", here, "benchmarks.gpu_products")
    torch = parts.run("torch's products", peer, "benchmarks.peers.torch_products")
    if products:
        report_products(products, torch)
    fp8 = parts.run("fp8", here, "benchmarks.gpu_fp8")
    passed &= fp8 is not None and report_fp8(fp8)
    step = parts.run("step", here, "benchmarks.gpu_step")
    peers = {}
    for mode in ("eager", "compiled"):
        name = f"transformers, {mode}, the router's"
        found = parts.run(name, peer, "benchmarks.peers.transformers_v2_lite", mode)
        if found:
            peers[name] = found
    if step:
        report_step(step, peers)
    if flags.json:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        flags.json.write_text(json.dumps({"date": now, **parts.results}, indent=1) + "\n")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
