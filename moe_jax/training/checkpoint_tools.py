"""What can be done with the checkpoints of a run, from outside: `python -m moe_jax.checkpoints`."""

import datetime
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_jax.config import UserError
from moe_jax.fields import differing, read_json
from moe_jax.interop import manifest
from moe_jax.interop.lazy import Lazy, flatten, pieces
from moe_jax.interop.orbax_files import (
    TOKENIZER,
    find_tokenizer,
    read_arrays,
    read_checkpoint,
    write_checkpoint,
)
from moe_jax.training.checkpoint import DAMAGED, DELETING
from moe_jax.training.lock import locked
from moe_jax.units import format_bytes


def listing(workdir: Path, verify: bool) -> Iterator[str]:
    """A line a checkpoint: step, size, when, held-out loss, and whether it is whole.

    What is wrong with one stands below it.
    """
    paths = _all(workdir)
    if not paths:
        yield f"{workdir} has no checkpoints yet"
    for path in paths:
        faults = []
        size = format_bytes(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()))
        when = datetime.datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "minutes")
        if path.name.endswith(DAMAGED):
            state = "set aside as damaged"
        elif not manifest.is_complete(path):
            state = "never finished"
        elif not verify:
            state = "finished"
        else:
            faults = manifest.faults(path)
            state = "damaged" if faults else "whole"
        yield f"{path.name:>8}  {size:>10}  {when}  {_loss(path)}  {state}"
        yield from (f"          {fault}" for fault in faults)


def compare(workdir: Path, *names: str) -> Iterator[str]:
    """What differs between two checkpoints: fields of the config, and arrays, by how much."""
    if len(names) != 2:
        raise UserError(f"--compare={','.join(names)} must be two steps, as in --compare=40,80")
    first, second = (_one(workdir, name) for name in names)
    configs = [read_json(path / "document" / "metadata")["config"] for path in (first, second)]
    for field, (before, now) in sorted(differing(*configs).items()):
        yield f"{field}: {before!r} -> {now!r}"
    arrays = [
        {"/".join(path): lazy for path, lazy in flatten(read_arrays(path)).items()}
        for path in (first, second)
    ]
    equal = 0
    for name in sorted(arrays[0].keys() | arrays[1].keys()):
        a, b = (found.get(name) for found in arrays)
        if a is None or b is None:
            yield f"{name}: only in {first.name if b is None else second.name}"
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            yield f"{name}: {a.dtype}{list(a.shape)} -> {b.dtype}{list(b.shape)}"
        elif text := _difference(a, b):
            yield f"{name}: {text}"
        else:
            equal += 1
    total = len(arrays[0].keys() | arrays[1].keys())
    yield f"{equal} of {total} arrays are equal, bit for bit"


def _difference(a: Lazy, b: Lazy) -> str:
    """In words; empty if all bits are equal."""
    changed, largest = 0, 0.0
    for index in pieces(a.shape, a.dtype.itemsize):
        x, y = np.asarray(a.read(index)), np.asarray(b.read(index))
        differ = np.any(_bytes(x) != _bytes(y), axis=1)
        if np.any(differ):
            changed += int(np.count_nonzero(differ))
            apart = np.abs(x.astype(np.float64) - y.astype(np.float64))
            largest = max(largest, float(apart.max()))
    if not changed:
        return ""
    count = "all" if changed == a.size else f"{changed:,} of {a.size:,}"
    return f"{count} differ by up to {largest:.3g}"


def _bytes(x: np.ndarray) -> np.ndarray:
    """[values, bytes of one] uint8."""
    return np.ascontiguousarray(x).reshape(-1, 1).view(np.uint8)


def export(workdir: Path, name: str, target: str | None) -> Iterator[str]:
    """Writes the weights alone, as a checkpoint that stands by itself, tokenizer included."""
    if target is None:
        raise UserError("--export needs --target, the folder to write")
    if Path(target).exists():
        raise UserError(f"--target={target} exists; give another or remove it")
    path = _one(workdir, name)
    _, weights = read_checkpoint(path)
    write_checkpoint(Path(target), read_json(path / "document" / "metadata")["config"], weights)
    tokenizer = find_tokenizer(path)
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, Path(target) / TOKENIZER)
    total = sum(lazy.size for lazy in flatten(weights).values())
    yield f"written     {target}: {total:,} weights of checkpoint {path.name}"


def delete(workdir: Path, names: Sequence[str]) -> Iterator[str]:
    """Deletes these, all or none; never the newest that is whole."""
    if not names:
        raise UserError("--delete names no step, as --delete=40,60 does")
    paths = [_one(workdir, name) for name in names]
    newest = next(
        (
            path
            for path in reversed(_all(workdir))
            if path.name.isdecimal() and not manifest.faults(path)
        ),
        None,
    )
    if newest in paths:
        raise UserError(
            f"checkpoint {newest.name if newest else ''} is the newest that is whole; a run would "
            "not go on without it: remove the work directory to begin anew"
        )
    with locked(workdir):
        for path in paths:
            # Renamed first: half deleted, it would pass for damaged.
            shutil.rmtree(path.rename(path.with_name(path.name + DELETING)))
            yield f"deleted     {path}"


def _all(workdir: Path) -> list[Path]:
    """By step; what is no checkpoint is left out."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir} is no work directory: it has no folder checkpoints")
    paths = [
        path
        for path in folder.iterdir()
        if path.is_dir() and path.name.removesuffix(DAMAGED).isdecimal()
    ]
    return sorted(paths, key=lambda path: (int(path.name.removesuffix(DAMAGED)), path.name))


def _one(workdir: Path, name: str) -> Path:
    paths = _all(workdir)
    for path in paths:
        if path.name == name:
            return path
    there = ", ".join(path.name for path in paths)
    raise UserError(f"{workdir} has no checkpoint {name}; there are {there or 'none'}")


def _loss(path: Path) -> str:
    try:
        loss = read_json(path / "document" / "metadata").get("eval_loss")
    except UserError:
        loss = None
    return "held-out loss      -" if loss is None else f"held-out loss {loss:.4f}"
