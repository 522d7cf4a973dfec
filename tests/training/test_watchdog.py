"""A process that no longer moves ends itself and says where it stood."""

import os
import subprocess
import sys
from pathlib import Path

import moe_jax

HANGS = """
import ctypes
from moe_jax.training.watchdog import watchdog

def a_step_that_hangs():
    ctypes.CDLL(None).pause()

with watchdog(0.2 / 60) as dog:
    dog.progress()
    a_step_that_hangs()
"""
MOVES = """
from moe_jax.training.watchdog import watchdog

with watchdog(1.0) as dog:
    dog.progress()
with watchdog(0.0) as dog:
    dog.progress()
print("done")
"""


def _run(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(Path(moe_jax.__path__[0]).parent)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_hang_prints_the_stacks_and_fails() -> None:
    done = _run(HANGS)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in a_step_that_hangs" in done.stderr


def test_progress_goes_on() -> None:
    done = _run(MOVES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
