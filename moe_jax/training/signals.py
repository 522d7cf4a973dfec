"""What is asked of a run from outside: to save, to stop, to make room.

    SIGINT                 finish the step, save and leave with exit code 0; a second one leaves at
                           once and saves nothing
    SIGTERM, SIGUSR1       the same with exit code 75, which launchers restart: notices of
                           preemption (SIGUSR1 is what Slurm's --signal is set to)
    SIGUSR2, WORKDIR/save  save after this step and go on; the file is removed

The clock asks as well, if the config has it so: every so many minutes for a save.
A signal to one process is one to all: they settle after each step what has been asked.
"""

import contextlib
import enum
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from moe_jax.training import processes

RESTART = 75  # EX_TEMPFAIL: the same command goes on
AT_ONCE = 130  # what a shell says of SIGINT


class Request(enum.IntEnum):
    """What is asked for; of several, the largest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2
    PREEMPT = 3

    @property
    def stops(self) -> bool:
        return self >= Request.STOP

    @property
    def exit_code(self) -> int:
        return RESTART if self is Request.PREEMPT else 0


MEANING = {
    signal.SIGINT: Request.STOP,
    signal.SIGTERM: Request.PREEMPT,
    signal.SIGUSR1: Request.PREEMPT,
    signal.SIGUSR2: Request.SAVE,
}


class Requests(contextlib.AbstractContextManager):
    """Listens while it is entered; must be entered in the main thread.

    Python runs a signal's handler only between two of its own operations, which may be a long step
    away. So a thread reads what the interpreter writes down at once.
    """

    def __init__(self, workdir: Path, save_minutes: float, say: Callable[[str], None]):
        self._file, self._seconds, self._say = workdir / "save", 60 * save_minutes, say
        self._saved = time.monotonic()  # which no change of the clock moves
        self._asked: set[Request] = set()

    def __enter__(self) -> "Requests":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._handlers = {s: signal.signal(s, lambda *_: None) for s in MEANING}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # which ends the thread
        self._thread.join()
        os.close(self._reader)

    def _listen(self) -> None:
        while received := os.read(self._reader, 1):
            request = MEANING.get(signal.Signals(received[0]), Request.NOTHING)
            if request is Request.STOP:
                if request in self._asked:
                    os._exit(AT_ONCE)  # no clean-up; a checkpoint is seen once it is whole
                self._say("interrupted after this step, saved; once more leaves at once")
            self._asked.add(request)

    def settled(self) -> Request:
        """What any process was asked for since the last call; all must call, after each step."""
        if jax.process_index() == 0:
            late = self._seconds and time.monotonic() - self._saved >= self._seconds
            if late or self._file.exists():
                self._file.unlink(missing_ok=True)
                self._asked.add(Request.SAVE)
        own = max(self._asked, default=Request.NOTHING)
        self._asked.discard(Request.SAVE)
        return Request(processes.largest(own))

    def saved(self) -> None:
        """The next save by the clock counts from here."""
        self._saved = time.monotonic()
