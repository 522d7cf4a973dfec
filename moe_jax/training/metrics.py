"""The record of a run: `metrics.jsonl`, one JSON object a row, and the same as TensorBoard events.

A resumed run takes up its record where the checkpoint stands: rows of steps that a crash lost are
dropped when the file is opened, so that the file equals that of a run that was never interrupted.
TensorBoard's files are only ever added to: it is told of the resumption and hides what came after.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore


class MetricsWriter:
    """Writes rows to `WORKDIR/metrics.jsonl` and events to `WORKDIR/tensorboard`.

    On a full disk rows wait in memory until there is room; events are lost.

    Args:
      resume_step: both are opened for appending, less the rows of steps after this (0: a new run).
      say: told for a person.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        resume_step: int,
        say: Callable[[str], None] = print,
    ) -> None:
        folder = Path(workdir) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        path = Path(workdir) / "metrics.jsonl"
        if path.exists():
            _drop_rows_after(path, resume_step)
        self._file, self._waiting, self._say = path.open("ab", buffering=0), b"", say
        # Event files are named by the second: a quick restart must not overwrite the last one. Not
        # tensorboardX's SummaryWriter: its thread dies of a full disk, and then its queue blocks.
        self._events = EventsWriter(str(folder / "events"), f".after-step-{resume_step}")
        start = SessionLog(status=SessionLog.START)  # which hides events from this step on
        self._event(step=resume_step + 1, session_log=start)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row and flushes it; a number that JSON lacks (NaN, infinity) becomes null.

        Args:
          row: names and values, among them `step`; numbers also become TensorBoard scalars.
        """
        plain = {name: _plain(value) for name, value in row.items()}
        waited = bool(self._waiting)
        self._waiting += json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not waited:
                self._say(f"not written rows of metrics.jsonl wait: {error.strerror}")
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in plain.items()
            if name != "step" and isinstance(value, int | float)
        ]
        self._event(step=plain["step"], summary=Summary(value=values))

    def _event(self, **fields: Any) -> None:
        with contextlib.suppress(OSError):
            self._events.write_event(Event(wall_time=time.time(), **fields))
            self._events.flush()

    def close(self) -> None:
        """Closes both."""
        self._file.close()
        with contextlib.suppress(OSError):
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
