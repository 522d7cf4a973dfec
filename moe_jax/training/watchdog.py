"""The end of a run that no longer moves."""

import contextlib
import faulthandler
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def watchdog(minutes: float) -> Iterator["Watchdog"]:
    """Ends the process unless it is told of progress every so many minutes; 0: never."""
    dog = Watchdog(60 * minutes)
    dog.progress()
    try:
        yield dog
    finally:
        faulthandler.cancel_dump_traceback_later()


class Watchdog:
    """The interpreter's own timer: it prints the stacks of all threads and exits with code 1.

    It needs nothing of Python while it does so, so it works in a step that hangs. All processes
    wait for one that hangs; each ends itself and prints its own stacks.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def progress(self) -> None:
        if self._seconds and sys.__stderr__:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)
