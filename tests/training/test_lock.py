"""One run at a time on a work directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_jax
from moe_jax.config import UserError
from moe_jax.training.lock import locked

ROOT = Path(moe_jax.__path__[0]).parent
HOLDER = """
import sys
from pathlib import Path
from moe_jax.training.lock import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_refused_by_name_until_the_first_is_gone(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with first:
        assert first.stdout and first.stdout.readline() == "locked\n"
        host = os.uname().nodename
        match = f"another run writes to .*: process {first.pid} on {host}, since "
        with pytest.raises(UserError, match=match), locked(tmp_path):
            pass
        first.kill()
        first.wait()
        # What it left behind locks nothing.
        assert json.loads((tmp_path / "lock").read_text())["process"] == first.pid
        with locked(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_says_nothing_still_locks(tmp_path: Path) -> None:
    with locked(tmp_path):
        os.truncate(tmp_path / "lock", 0)
        with pytest.raises(UserError, match="it has just started"), locked(tmp_path):
            pass
