"""The same small model trained in float32, bfloat16 and each recipe of eight bits.

    python -m benchmarks.fp8_parity [--data FILE ...] [--steps=200] [--seeds=3] [--json=PATH]

The model and its training are of `fp8_model.py`. A seed sets the weights at the start and the order
of documents, so that runs of one seed see the same batches from the same start. They part all the
same, the sooner the higher --peak_lr is. Runs that are complete in --workdir, which is for one set
of options, are not run again. On two quiet cores a run takes about two minutes.

Printed are, by recipe: the held-out loss at the end; its relative difference from bfloat16's of the
same seed, and the mean of these with its standard error; how far bfloat16's own seeds lie apart;
and the cosine of the gradient with float32's at the same weights on the same batch, before the
first step and after the last, of the worst group of parameters. With --plot=PATH losses and
differences are drawn (needs matplotlib).
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import fp8_model, record
from benchmarks.fp8_model import PRECISIONS, Bench

BASE, EXACT = "bf16", "float32"
DOCUMENT = 4096  # bytes that paragraphs of a file without records are joined to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", type=Path, help="text and JSONL; default: stdlib")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peak_lr", type=float, default=2e-3)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/fp8_parity"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    flags = parser.parse_args()
    fp8_model.start()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    source = "stdlib" if flags.data is None else _documents(flags.data, flags.workdir)
    settings = {"training.num_steps": flags.steps, "optimizer.peak_lr": flags.peak_lr}
    bench = Bench(**{"data.source": source, **settings})
    runs: dict[str, list] = {precision: [] for precision in flags.precisions}
    for seed in range(flags.seeds):
        for precision, of_seeds in runs.items():
            done = flags.workdir / f"{precision}_{seed}.json"
            if not done.exists():
                done.write_text(json.dumps(_run(bench, precision, seed, flags.steps)))
            of_seeds.append(json.loads(done.read_text()))
            print(f"{precision}, seed {seed}: {of_seeds[-1]['held_out']:.4f}", flush=True)
    rows = {precision: _figures(of_seeds, runs[BASE]) for precision, of_seeds in runs.items()}
    spread = _spread([run["held_out"] for run in runs[BASE]])
    print(f"\n{flags.steps} steps, {flags.seeds} seeds; seeds of {BASE} spread by {spread:.2%}\n")
    print("| | held-out loss | against bf16, by seed | mean | worst cosine at first, at the end |")
    print("|---|---|---|---|---|")
    for precision, row in rows.items():
        by_seed = " ".join(f"{d:+.2%}" for d in row["difference"])
        mean = f"{row['mean']:+.2%}"
        if flags.seeds > 1:
            mean += f" ± {row['standard_error']:.2%}"
        first, last = (f"{min(row[f'cosine_{when}'].values()):.4f}" for when in ("first", "last"))
        loss = statistics.mean(row["held_out"])
        print(f"| {precision} | {loss:.4f} | {by_seed} | {mean} | {first} {last} |")
    record.save(flags.json, steps=flags.steps, peak_lr=flags.peak_lr, spread=spread, rows=rows)
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


def _run(bench: Bench, precision: str, seed: int, steps: int) -> dict[str, Any]:
    batches, losses = bench.batches(seed), []
    with jax.set_mesh(bench.mesh):
        state = bench.state(precision, seed)
        first = _cosines(bench, precision, state, next(batches))
        for _ in range(steps):
            state, metrics = bench.step(precision, state, next(batches))
            losses.append(float(metrics["loss"]))
        last = _cosines(bench, precision, state, next(batches))
        held_out = bench.held_out(precision, state)
    return {"losses": losses, "held_out": held_out, "cosine_first": first, "cosine_last": last}


def _cosines(bench: Bench, precision: str, state: Any, batch: Any) -> dict[str, float]:
    """Of the gradient with float32's, by parameter."""
    exact = bench.gradient(EXACT, state, batch)
    return {
        name: _cosine(found, exact[name])
        for name, found in bench.gradient(precision, state, batch).items()
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def _figures(runs: list, base: list) -> dict[str, Any]:
    difference = [a["held_out"] / b["held_out"] - 1 for a, b in zip(runs, base, strict=True)]
    deviation = statistics.stdev(difference) if len(difference) > 1 else 0.0  # of one, nothing
    figures: dict[str, Any] = {
        "held_out": [run["held_out"] for run in runs],
        "difference": difference,
        "mean": statistics.mean(difference),
        "standard_error": deviation / len(difference) ** 0.5,
    }
    for when in ("cosine_first", "cosine_last"):
        figures[when] = {name: min(run[when][name] for run in runs) for name in runs[0][when]}
    return figures


def _spread(values: list[float]) -> float:
    """The distance of the farthest two, as a share of their mean."""
    return (max(values) - min(values)) / statistics.mean(values)


def _plot(path: Path, runs: dict[str, list]) -> None:
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 7))
    for number, (precision, of_seeds) in enumerate(runs.items()):
        for seed, run in enumerate(of_seeds):
            style = dict(color=f"C{number}", linewidth=0.9, label="" if seed else precision)
            above.plot(run["losses"], **style)
            if precision != BASE:
                pairs = zip(run["losses"], runs[BASE][seed]["losses"], strict=True)
                below.plot([100 * (a / b - 1) for a, b in pairs], **style)
    above.set_ylabel("training loss, nats a byte")
    above.legend()
    below.set(ylabel=f"difference from {BASE}, %", xlabel="step", ylim=(-1.5, 1.5))
    below.axhspan(-0.25, 0.25, color="0.9")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
