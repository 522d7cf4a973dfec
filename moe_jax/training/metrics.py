"""The record of a run: `metrics.jsonl`, one JSON object a row, and the same as TensorBoard events.

A resumed run takes up its record where the checkpoint stands: rows of steps that a crash lost are
dropped when the file is opened, so that the file equals that of a run that was never interrupted.
TensorBoard's files are only ever added to: it is told of the resumption and hides what came after.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Writes rows to `WORKDIR/metrics.jsonl` and events to `WORKDIR/tensorboard`."""

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int) -> None:
        """Opens both for appending, less the rows of steps after `resume_step` (0: a new run)."""
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        if path.exists():
            _drop_rows_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=resume_step + 1,
            flush_secs=10,
            # Event files are named by the second: a quick restart must not overwrite the last one.
            filename_suffix=f".after-step-{resume_step}",
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row and flushes it; a number that JSON lacks (NaN, infinity) becomes null.

        Args:
          row: names and values, among them `step`; numbers also become TensorBoard scalars.
        """
        plain = {name: _plain(value) for name, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in plain.items():
            if name != "step" and isinstance(value, int | float):
                self._events.add_scalar(name, value, plain["step"])

    def close(self) -> None:
        """Writes out what is buffered and closes both."""
        self._file.close()
        self._events.close()


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: a one-element array as its number, NaN and infinity as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _drop_rows_after(path: Path, step: int) -> None:
    """Rewrites the file without rows past `step` and without a last line that was cut in half."""
    kept = [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n") and json.loads(line)["step"] <= step
    ]
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
