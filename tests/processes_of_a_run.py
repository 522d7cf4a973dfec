"""A script as several real processes that JAX joins."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import moe_jax

ROOT = Path(moe_jax.__path__[0]).parent


def run_joined(script: str, count: int, folder: Path) -> None:
    """Runs `script` in so many processes, and fails with what they say if one of them does.

    Its arguments are the coordinator's address, the count, the process's number, and the folder.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(count), str(number), str(folder)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        pytest.fail("\n".join(errors))
