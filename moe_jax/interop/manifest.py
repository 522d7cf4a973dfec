"""The manifest of a checkpoint: the size and hash of every file in it.

It is written last, so a checkpoint without one was never finished. Each of n processes writes a
part, `manifest.i-of-n.json`, of its share of the files; all parts are there, or it is not whole.
"""

import concurrent.futures
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

_PART = re.compile(r"manifest\.(\d+)-of-(\d+)\.json")
_CHUNK = 2**22


def write(path: Path, part: int = 0, parts: int = 1) -> None:
    """Writes this part of the manifest of the finished checkpoint at `path`."""
    names = _share(_files(path), part, parts)
    described = dict(zip(names, _describe(path, names), strict=True))
    file = path / f"manifest.{part}-of-{parts}.json"
    new = file.with_suffix(".new")
    with new.open("w") as opened:
        json.dump({"checkpoint": path.name, "files": described}, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    new.replace(file)


def is_complete(path: Path) -> bool:
    """Whether all parts are there, which says nothing of the files."""
    found = [match for match in map(_PART.fullmatch, os.listdir(path)) if match]
    return bool(found) and len(found) == int(found[0][2])


def faults(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with this share of a checkpoint's files, each in a few words; none: whole."""
    if not is_complete(path):
        return ["its manifest is missing, so it was never finished"]
    expected: dict[str, list] = {}
    for file in sorted(path.glob("manifest.*-of-*.json")):
        try:
            manifest = json.loads(file.read_text())
            expected |= manifest["files"]
            name = manifest["checkpoint"]
        except (ValueError, KeyError, TypeError):
            return [f"{file.name} is no manifest"]
        if path.name.isdecimal() and name != path.name:  # a copy may have any other name
            return [f"{file.name} is that of checkpoint {name}"]
    there = set(_files(path))
    missing = [f"{name} is missing" for name in sorted(expected.keys() - there)]
    foreign = [f"{name} is not in the manifest" for name in sorted(there - expected.keys())]
    names = _share(there & expected.keys(), part, parts)
    differing = [
        f"{name} has {size} bytes, not {expected[name][0]}"
        if size != expected[name][0]
        else f"{name} has other content than was written"
        for name, (size, digest) in zip(names, _describe(path, names), strict=True)
        if [size, digest] != expected[name]
    ]
    return missing + foreign + differing


def _files(path: Path) -> list[str]:
    return [
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and not (file.parent == path and file.name.startswith("manifest."))
    ]


def _share(names: Iterable[str], part: int, parts: int) -> list[str]:
    return sorted(names)[part::parts]


def _describe(path: Path, names: list[str]) -> list[list]:
    """[bytes, SHA-256] of each file."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: _hash(path / name), names))


def _hash(file: Path) -> list:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]
