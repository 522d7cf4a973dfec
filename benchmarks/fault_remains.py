"""What is left of a very small run: its curve, its checkpoints, and if they equal another's."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.interop import manifest
from moe_jax.interop.lazy import flatten, whole
from moe_jax.interop.orbax_files import find_checkpoint, read_arrays

NOT_COMPARED = {"tokens_per_second", "mfu", "checkpoint_stall_seconds", "data_wait_fraction"}


def rows(workdir: Path) -> list[dict[str, Any]]:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(workdir: Path) -> list[int]:
    return [row["step"] for row in rows(workdir) if "loss" in row]


def curve(workdir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows(workdir)]


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint."""
    path = find_checkpoint(workdir)
    assert path is not None, workdir
    leaves = flatten(read_arrays(path)).items()
    return {"/".join(names): np.asarray(lazy.read(whole(lazy.shape))) for names, lazy in leaves}


def same(workdir: Path, undisturbed: Path) -> bool:
    """Whether loss curve and final state are equal, bit for bit."""
    a, b = arrays(workdir), arrays(undisturbed)
    equal = a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
    return equal and curve(workdir) == curve(undisturbed)


def newest_whole(workdir: Path) -> int:
    """The step of the newest whole checkpoint; 0: there is none."""
    folders = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
    return max((int(p.name) for p in folders if not manifest.faults(p)), default=0)
