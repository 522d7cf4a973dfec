"""A run that goes on elsewhere: on other splits here; on other processes in test_multi_process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import fault_runs
from moe_jax.training import loop

CHANGES: dict[str, Any] = {
    "mesh.num_cpu_devices": 8,
    "data.holdout_every": 0,
    "optimizer.eps": 1e-3,  # the first updates follow the gradient, not its rounding errors
    "training.num_steps": 6,
    "checkpoint.every_steps": 100,
}


def test_another_split_goes_on_with_the_same_batches_and_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen, real = fault_runs.write_corpus(tmp_path / "corpus"), [], loop.global_batch

    def global_batch(batch: dict[str, np.ndarray], *arguments: Any) -> Any:
        seen.append({name: x.tobytes() for name, x in batch.items()})
        return real(batch, *arguments)

    monkeypatch.setattr(loop, "global_batch", global_batch)

    def run(workdir: Path, **changes: Any) -> None:
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        loop.train(fault_runs.config(source, CHANGES | changes), workdir)

    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(whole, mesh__fsdp=4, mesh__expert=2)
    batches = list(seen)
    seen.clear()
    run(moved, mesh__fsdp=4, mesh__expert=2, training__stop_after_step=3)
    run(moved, mesh__fsdp=2, mesh__expert=4)
    assert seen == batches and len(batches) == 6
    rows = [
        [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (whole, moved)
    ]
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]] == [*range(1, 7)]
    assert [row["loss"] for row in rows[1][:3]] == [row["loss"] for row in rows[0][:3]]
    for before, now in zip(rows[0][3:], rows[1][3:], strict=True):
        for name in ("loss", "grad_norm", "max_violation"):
            assert now[name] == pytest.approx(before[name], rel=1e-4), (now["step"], name)
    # It has teeth: a step that is not taken moves the loss more than that.
    assert abs(rows[0][4]["loss"] / rows[0][3]["loss"] - 1) > 1e-3
