"""Two real processes, started by hand as a person starts them, against one."""

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import moe_jax

ROOT = Path(moe_jax.__path__[0]).parent
CUT = {
    "mesh.num_cpu_devices": 4,
    "mesh.fsdp": 2,
    "mesh.expert": 2,
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.intermediate_size": 24,
    "model.attention.num_heads": 2,
    "model.attention.q_lora_rank": 8,
    "model.attention.kv_lora_rank": 8,
    "model.moe.num_experts": 8,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.intermediate_size": 8,
    "precision.compute_dtype": "float32",
    "optimizer.warmup_steps": 2,
    "optimizer.eps": 1e-3,  # the first updates follow the gradient, not its rounding errors
    "data.stages": ({"sequence_length": 16},),
    "data.num_streams": 4,
    "training.num_steps": 5,
    "training.tokens_per_step": 256,
    "training.micro_batches": 2,
    "training.log_every_steps": 1,
    "training.eval_every_steps": 5,
    "training.eval_batches": 2,
    "training.sample_tokens": 2,
}
TIMINGS = {"tokens_per_second", "mfu", "data_wait_fraction", "checkpoint_stall_seconds"}


def _run(workdir: Path, num_processes: int, changes: Mapping[str, Any]) -> list[str]:
    """What each process prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "moe_jax.main", "--config=configs/tiny.py"),
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in {**CUT, **changes}.items()),
    ]
    by_hand = [f"--coordinator_address=localhost:{port}", f"--num_processes={num_processes}"]
    processes = [
        subprocess.Popen(
            command + ([*by_hand, f"--process_id={i}"] if num_processes > 1 else []),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(num_processes)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = "\n".join(error for _, error in outputs)
    assert [process.returncode for process in processes] == [0] * num_processes, errors
    return [out for out, _ in outputs]


def _rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_save_and_resume_as_one_does(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i:02}.txt").write_text("the cat sat on the mat. " * (1 + i % 7) + str(i))
    changes = {"data.source": str(corpus / "*.txt")}

    (out,) = _run(tmp_path / "one", 1, changes)
    first, second = _run(tmp_path / "two", 2, {**changes, "training.stop_after_step": 2})
    assert "processes: 2" in first and "step      2  loss" in first
    assert "loss" not in second  # one process speaks for all
    # Each on its own half of what the other two wrote.
    first, second = _run(tmp_path / "two", 2, changes)
    assert "resuming    from step 2" in first

    expected, actual = _rows(tmp_path / "one"), _rows(tmp_path / "two")
    assert [row["step"] for row in actual if "loss" in row] == [1, 2, 3, 4, 5]
    by_step = {(row["step"], "loss" in row): row for row in expected}
    for row in actual:
        if "eval_loss" in row and row["step"] == 2:
            continue  # made because the run stopped there
        wanted = by_step[row["step"], "loss" in row]
        assert row.keys() == wanted.keys()
        for name in row.keys() - {
            "tokens_per_second",
            "mfu",
            "data_wait_fraction",
            "checkpoint_stall_seconds",
        }:
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), (row["step"], name)
    assert list(tmp_path.rglob("two/**/metrics.jsonl")) == [tmp_path / "two" / "metrics.jsonl"]

    # And one process goes on from what two have written.
    (out,) = _run(tmp_path / "two", 1, {**changes, "training.num_steps": 6})
    assert "resuming    from step 5" in out and "step      6  loss" in out
