"""Contenders take turns: each is a process that gets ready, waits, and times one run a turn.

Of the standard library alone, so that it works in a peer's environment too.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Memory in huge pages, and kept from step to step: otherwise temporary memory is new in each, and a
# fifth of the time goes into the kernel's handing it out in pages of 4 KiB. For all alike.
MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        [
            "glibc.malloc.hugetlb=1",
            "glibc.malloc.mmap_max=0",
            "glibc.malloc.trim_threshold=17179869184",
            "glibc.malloc.arena_max=1",
        ]
    )
}


def serve(run: Callable[..., object], facts: dict) -> None:
    """The contender's end: warms up, says its facts, and times `run` for each line it gets.

    The words of a line are the run's arguments.
    """
    for _ in range(3):
        run()
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        run(*line.split())
        print(time.perf_counter() - start, flush=True)


class Contender:
    """The other end. `facts` is what it has said of itself.

    Args:
      python: the interpreter.
      arguments: a module of this repository, and its arguments.
    Raises:
      RuntimeError: it ended before its turn, with the last line of its errors.
    """

    def __init__(self, python: str, *arguments: str):
        # A pipe that nobody reads would fill.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", *arguments],
            cwd=ROOT,
            env=MEMORY | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        line = self._read()
        while not line.startswith("{"):  # some libraries greet when they are imported
            line = self._read()
        self.facts = json.loads(line)

    def turn(self, *arguments: str) -> float:
        """Seconds of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(arguments) + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError((self._errors.read().strip().splitlines() or ["no output"])[-1])
        return line
