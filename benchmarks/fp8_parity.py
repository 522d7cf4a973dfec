"""The same small model trained in float32, bfloat16 and each recipe of eight bits.

    python -m benchmarks.fp8_parity [--data FILE ...] [--steps=300] [--seeds=3] [--json=PATH]

Routed experts on two emulated devices, so that tokens travel in eight bits too. A seed sets the
weights at the start and the order of documents. Runs that are complete in --workdir are
not run again.

Printed are, by recipe, the held-out loss at the end and its relative difference from bfloat16's of
the same seed, beside how far bfloat16's own seeds lie apart, and the same of the training loss over
the last quarter. With --plot=PATH losses and differences are drawn (needs matplotlib).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import record

PRECISIONS = {
    "float32": {"compute_dtype": "float32"},
    "bf16": {},
    "fp8_block": {"recipe": "fp8_block"},
    "fp8_tensor": {"recipe": "fp8_tensor"},
    "mxfp8": {"recipe": "mxfp8"},
}
BASE = "bf16"
# configs/tiny.py with dims of whole tiles.
MODEL = {
    "mesh.num_cpu_devices": 2,
    "mesh.fsdp": 1,
    "mesh.expert": 2,
    "model.attention.q_lora_rank": 128,
    "model.attention.kv_lora_rank": 128,
    "model.moe.intermediate_size": 128,
    "training.sample_tokens": 0,
    "training.eval_batches": 16,
}
DOCUMENT = 4096  # bytes that paragraphs of a file without records are joined to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", type=Path, help="text and JSONL; default: stdlib")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/fp8_parity"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    flags = parser.parse_args()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    source = "stdlib" if flags.data is None else _documents(flags.data, flags.workdir)
    runs = {
        precision: [
            _run(flags.workdir / f"{precision}_{seed}", precision, seed, source, flags.steps)
            for seed in range(flags.seeds)
        ]
        for precision in flags.precisions
    }
    rows = {precision: _figures(of_seeds, runs[BASE]) for precision, of_seeds in runs.items()}
    spread = _spread([_held_out(run) for run in runs[BASE]])
    print(f"\n{flags.steps} steps, {flags.seeds} seeds; seeds of {BASE} spread by {spread:.2%}\n")
    print("| | held-out loss | against bf16, by seed | training loss, last quarter |")
    print("|---|---|---|---|")
    for precision, row in rows.items():
        by_seed = " ".join(f"{d:+.2%}" for d in row["held_out_difference"])
        training = f"{statistics.mean(row['training_difference']):+.2%}"
        print(f"| {precision} | {statistics.mean(row['held_out']):.4f} | {by_seed} | {training} |")
    record.save(flags.json, steps=flags.steps, spread=spread, rows=rows)
    if flags.plot:
        _plot(flags.plot, runs)


def _documents(files: list[Path], workdir: Path) -> str:
    """One JSONL file of all documents; a record's strings are one, and so are a few paragraphs."""
    target = workdir / "documents.jsonl"
    with target.open("w") as out:
        for file in files:
            text = file.read_text("utf-8")
            for document in _records(text) if file.suffix == ".jsonl" else _joined(text):
                out.write(json.dumps({"text": document}) + "\n")
    return str(target)


def _records(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield "\n".join(value for value in json.loads(line).values() if isinstance(value, str))


def _joined(text: str) -> Iterator[str]:
    joined = ""
    for paragraph in text.split("\n\n"):
        joined += paragraph + "\n\n"
        if len(joined) >= DOCUMENT:
            yield joined
            joined = ""
    if joined:
        yield joined


def _run(workdir: Path, precision: str, seed: int, source: str, steps: int) -> list[dict[str, Any]]:
    """The metrics of a run, by step."""
    metrics = workdir / "metrics.jsonl"
    settings = MODEL | {f"precision.{k}": v for k, v in PRECISIONS[precision].items()}
    settings |= {
        "seed": seed,
        "data.source": source,
        "training.num_steps": steps,
        "training.eval_every_steps": steps,
        "checkpoint.every_steps": steps,
    }
    if not (metrics.exists() and _held_out(_read(metrics)) is not None):
        command = [sys.executable, "-m", "moe_jax.main", "--config=configs/tiny.py"]
        command += [f"--workdir={workdir}"]
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        print(f"{precision}, seed {seed}", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return _read(metrics)


def _read(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def _held_out(run: list[dict[str, Any]]) -> float | None:
    losses = [record["eval_loss"] for record in run if "eval_loss" in record]
    return losses[-1] if losses else None


def _training(run: list[dict[str, Any]]) -> float:
    losses = [record["loss"] for record in run if "loss" in record]
    return statistics.mean(losses[-len(losses) // 4 :])


def _figures(runs: list, base: list) -> dict[str, list[float]]:
    held_out, base_held_out = [_held_out(run) for run in runs], [_held_out(run) for run in base]
    return {
        "held_out": held_out,
        "held_out_difference": [a / b - 1 for a, b in zip(held_out, base_held_out, strict=True)],
        "training_difference": [
            _training(a) / _training(b) - 1 for a, b in zip(runs, base, strict=True)
        ],
    }


def _spread(values: list[float]) -> float:
    """The distance of the farthest two, as a share of their mean."""
    return (max(values) - min(values)) / statistics.mean(values)


def _plot(path: Path, runs: dict[str, list]) -> None:
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 7))
    base = [_curve(run) for run in runs[BASE]]
    for number, (precision, of_seeds) in enumerate(runs.items()):
        for seed, run in enumerate(of_seeds):
            steps, losses = _curve(run)
            style = dict(color=f"C{number}", linewidth=0.9, label="" if seed else precision)
            above.plot(steps, losses, **style)
            if precision != BASE:
                difference = [100 * (a / b - 1) for a, b in zip(losses, base[seed][1], strict=True)]
                below.plot(steps, difference, **style)
    above.set_ylabel("training loss, nats a byte")
    above.legend()
    below.set(ylabel=f"difference from {BASE}, %", xlabel="step", ylim=(-2, 2))
    below.axhspan(-0.25, 0.25, color="0.9")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _curve(run: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    points = [(record["step"], record["loss"]) for record in run if "loss" in record]
    return [step for step, _ in points], [loss for _, loss in points]


if __name__ == "__main__":
    main()
