"""A command on data, run in a folder as a user would."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(module: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m moe_jax.MODULE`."""
    return subprocess.run(
        [sys.executable, "-m", f"moe_jax.{module}", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
