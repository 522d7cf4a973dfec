"""The record of a run: what is written, and that a resumed run continues it without a seam."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training.metrics import MetricsWriter


def _write(workdir: Path, resume_step: int, steps: range) -> None:
    writer = MetricsWriter(workdir, resume_step)
    for step in steps:
        writer.write({"step": step, "train/loss": 1 / step})
    writer.close()


def _scalars(workdir: Path) -> set[bytes]:
    """Raw contents of the event files, enough to look for names without TensorBoard."""
    return {file.read_bytes() for file in (workdir / "tensorboard").iterdir()}


def test_rows_and_events_have_the_same_names(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"step": 1, "train/loss": np.float32(0.5), "load": jnp.asarray(2), "note": "warm"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed before the close
    writer.close()

    assert [json.loads(line) for line in lines] == [
        {"step": 1, "train/loss": 0.5, "load": 2, "note": "warm"}
    ]
    (events,) = _scalars(tmp_path)
    assert b"train/loss" in events
    assert b"load" in events


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_json_lacks_becomes_null(tmp_path: Path, value: float) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"step": 1, "train/loss": value})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": null}\n'


def test_resumed_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    _write(tmp_path / "whole", 0, range(1, 9))

    resumed = tmp_path / "resumed"
    _write(resumed, 0, range(1, 8))
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # the crash came in the middle of a line
    _write(resumed, 4, range(5, 9))

    name = "metrics.jsonl"
    assert (resumed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in resumed.iterdir()) == [name, "tensorboard"]
    assert len(_scalars(resumed)) == 2, "the second run's events must not overwrite the first's"


def test_half_a_last_line_is_dropped_even_if_its_step_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    MetricsWriter(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_on_a_full_disk_rows_wait_for_room(tmp_path: Path) -> None:
    said: list[str] = []
    writer = MetricsWriter(tmp_path, 0, said.append)
    writer.write({"step": 1})
    file = writer._file
    with open("/dev/full", "wb", buffering=0) as writer._file:
        writer.write({"step": 2})
        writer.write({"step": 3})
    writer._file = file
    writer.write({"step": 4})
    writer.close()
    assert said == ["not written rows of metrics.jsonl wait: No space left on device"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
