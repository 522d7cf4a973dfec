"""The compiled train step on machines that are not here: docs/compiled.md. No device is needed.

    pip install -e ".[test-aot]"            # compiles for TPU
    pip install -e ".[cuda13]"              # compiles for H100, in an environment of its own
    python -m benchmarks.compiled_step [--targets v5p:4x4x4 v6e:8x8 tpu7x:4x4x4 h100:8x8]
        [--models deepseek_v2_lite deepseek_v3] [--factors 1.0 1.5]
        [--cuda_python=PYTHON]

Each row is compiled in a process of its own, so one that fails is a row that says so. Rows are kept
in benchmarks/compiled_step.json: a run replaces those that it makes, and writes the page from all.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "compiled_step.json"
PAGE = ROOT / "docs" / "compiled.md"
TARGETS = ("v5p:4x4x4", "v6e:8x8", "tpu7x:4x4x4", "h100:8x8")
MODELS = ("deepseek_v2_lite", "deepseek_v3")

HEAD = """# The compiled train step

Made by `python -m benchmarks.compiled_step`; do not edit. The step that trains
(`training/step.py`), at the layer sizes of DeepSeek-V2-Lite and V3, one dense and two routed layers
with embedding and head, bf16, rematerialization `none`, is compiled for devices that are not there.
`planning/compiled.py` counts what one device does: products and collectives, loop bodies as often
as they run, experts' kernels as far as balanced routing fills their buffers, other kernels as their
authors declare or, for GPU, from their shapes. Only the first round of an exchange counts. A device
has one row of 4,096 tokens (2,048 of V3 on v6e, whose memory holds no more), which travel in two
parts (`model.moe.exchange_parts`).

- *operations*: compiled, over what the model needs (`planning/operations.py`).
- *exchange*: bytes that leave a device in all-to-alls, over one copy of each token for each device
  that holds one of its experts, there and back, forward and backward
  (`planning/communication.py`). Below 1 where XLA narrows gradients of float32 results, on their
  way back to the experts, to the bfloat16 in which these take them.
- *hidden*: the share of the exchanges' own time, at the stated rates of the links, that is filled
  with products between start and done (`planning/overlap.py`).
- *memory*: of one device, state and temporaries. Of TPUs the latter are `temp_size_in_bytes`,
  which counts some twice (`memory_of` in `training/timing.py`). These rows were compiled when dense
  weights were split over `fsdp` alone; over the experts' axes as well, as now, both are less, and
  gradients of dense weights are scattered over these where the rows have all-reduces.
- Wanted are ratios of at most 1.1 at a buffer factor of 1.0, and no unwanted collective.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--factors", nargs="+", type=float, default=[1.0, 1.5])
    parser.add_argument("--cuda_python", default=sys.executable)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a row may take")
    flags = parser.parse_args()
    for target in flags.targets:
        for model in flags.models:
            for factor in flags.factors:
                python = flags.cuda_python if target.startswith("h100") else sys.executable
                arguments = [model, target, str(factor)]
                row = run([python, "-m", "benchmarks.compile_one", *arguments], flags.timeout)
                # Read late: two commands may run at once.
                rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                rows[f"{target} {model} {factor}"] = row
                ordered = dict(sorted(rows.items()))
                RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
                PAGE.write_text(page(ordered))


def run(command: list[str], timeout: float) -> dict:
    """The row that a process prints; {"error": its last line} if there is none."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled in {timeout:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    errors = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
    named = [line for line in errors if "Error" in line.split(":")[0]]
    return {"error": f"exit code {done.returncode}: {(named or errors)[-1][:300]}"}


def page(rows: dict[str, dict]) -> str:
    head = ["target", "model", "factor", "mesh", "operations", "exchange", "hidden"]
    head += ["memory", "unwanted", "compiled in"]
    lines = [HEAD, _row(head), _row(["---"] * len(head))]
    details = []
    for name, row in rows.items():
        target, model, factor = name.split()
        if "error" in row:
            cells = [target, model, factor, row["error"]]
            lines.append(_row(cells + [""] * (len(head) - len(cells))))
            continue
        unwanted = [c for c in row["collectives"] if c["unwanted"]]
        lines.append(
            _row(
                [target, model, factor, *_cells(row)]
                + [str(len(unwanted) or "none"), _seconds(row)]
            )
        )
        if factor == "1.0":
            details += [f"\n## {model} on {target}\n", *_details(row)]
    return "\n".join(lines + details) + "\n"


def _cells(row: dict) -> list[str]:
    operations = row["operations"] / row["needed_operations"]
    exchange = row["exchange_bytes"] / row["needed_exchange_bytes"]
    hidden = row["hidden_seconds"] / row["exchange_seconds"] if row["exchange_seconds"] else 0
    return [
        " × ".join(f"{axis} {size}" for axis, size in row["mesh"].items()),
        f"{row['operations'] / 1e12:.1f} T, {operations:.2f}",
        f"{row['exchange_bytes'] / 1e6:.0f} MB, {exchange:.2f}",
        f"{hidden:.0%}",
        f"{row['state_bytes'] / 2**30:.1f} + {row['temporary_bytes'] / 2**30:.1f} GiB",
    ]


def _seconds(row: dict) -> str:
    return f"{row['seconds']:.0f} s, jax {row['jax']}"


def _details(row: dict) -> list[str]:
    """Collectives of more than ten megabytes, and what is not counted."""
    lines = [
        f"{row['device']}: {row['operations'] / 1e12:.2f} T operations of "
        f"{row['needed_operations'] / 1e12:.2f} T needed; exchange "
        f"{row['exchange_bytes'] / 1e6:.1f} MB of {row['needed_exchange_bytes'] / 1e6:.1f} MB.\n",
        _row(["collective", "devices", "times", "MB each", "", "of", "unwanted"]),
        _row(["---"] * 7),
    ]
    large = [c for c in row["collectives"] if c["bytes"] * c["times"] >= 1e7 or c["unwanted"]]
    for c in large:
        lines.append(
            _row(
                [
                    c["kind"],
                    str(c["group"]),
                    f"{c['times']:g}",
                    f"{c['bytes'] / 1e6:.1f}",
                    "asynchronous" if c["asynchronous"] else "",
                    f"`{c['op_name']}`",
                    c["unwanted"],
                ]
            )
        )
    small = [c for c in row["collectives"] if c not in large]
    sent = sum(c["bytes"] * c["times"] for c in small)
    runs = sum(c["times"] for c in small)
    lines.append(f"\nAnd {runs:g} smaller ones of {sent / 1e6:.1f} MB in all.")
    for loop in row["loops_not_counted"]:
        lines.append(f"\nNot counted, since the data decide how often it runs: `{loop}`.")
    for kernel in row["kernels_not_counted"]:
        lines.append(f"\nNot counted, since its author declares nothing: `{kernel}`.")
    return lines


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
