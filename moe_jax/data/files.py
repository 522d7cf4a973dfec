"""The files of a source, their documents from front to back, and documents of bytes at random."""

import collections
import glob
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.documents import Document, Invalid
from moe_jax.data.formats import RECORDS, Place, at_random, format_of
from moe_jax.data.tokenizer import ByteTokenizer, encode_documents
from moe_jax.fields import UserError

# Tests and installed packages differ from machine to machine.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class File(NamedTuple):
    """A file and what it is called in sentences."""

    path: Path
    name: str


class Found(NamedTuple):
    """A document, and where it was."""

    file: int
    place: Place
    document: Document


# Raises `Invalid` for a document that is to be left out.
Screen = Callable[[Document, str], None]


def list_files(source: str, field: str = "config.data.source") -> list[File]:
    """The files of "stdlib", of a folder of records, or of a glob, in order.

    Args:
      field: what sentences call the source.

    Raises:
      UserError: there are none.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        names = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*.py")
            if not LEFT_OUT & set(path.relative_to(root).parts) and path.is_file()
        )
        return [File(root / name, name) for name in names]
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        paths = _in_folder(Path(pattern))
    else:
        names = sorted(glob.glob(pattern, recursive=True))
        paths = [Path(name) for name in names if os.path.isfile(name)]
    if not paths:
        raise UserError(
            f"{field}={source!r} matches no file; give 'stdlib', a glob of files or a folder"
        )
    return [File(path, str(path)) for path in paths]


def _in_folder(folder: Path) -> list[Path]:
    """Of a Hugging Face data set as `save_to_disk` writes it or as it is downloaded."""
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    if splits.is_file():
        names = json.loads(splits.read_text())["splits"]
        raise UserError(
            f"config.data.source={str(folder)!r} has the splits {', '.join(names)}; name one, as "
            f"in {folder / names[0]}"
        )
    if state.is_file():
        return [folder / file["filename"] for file in json.loads(state.read_text())["_data_files"]]
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name.endswith(tuple(RECORDS))
    )


def scan(
    files: Sequence[File],
    config: DataConfig,
    skipped: collections.Counter[str],
    screen: Screen | None = None,
) -> Iterator[Found]:
    """All documents that can be used.

    Args:
      skipped: takes what is left out, counted by reason.
      screen: leaves out more, which is counted and no mistake.
    Raises:
      UserError: a file or record cannot be used, and `config.skip_invalid` is False.
    """
    for index, (path, name) in enumerate(files):
        form = format_of(path)
        try:
            for place, raw in form.scan(path, name, config):
                where = place_name(name, place)
                try:
                    document = form.parse(raw, config, where)
                except Invalid as error:
                    _refuse(error, config.skip_invalid, skipped)
                    continue
                try:
                    if screen:
                        screen(document, where)
                except Invalid as error:
                    skipped[error.reason] += 1
                    continue
                yield Found(index, place, document)
        except Invalid as error:
            _refuse(error, config.skip_invalid, skipped)
        except OSError as error:
            _refuse(
                Invalid("unreadable file", f"cannot read {path}: {error.strerror or error}"),
                config.skip_invalid,
                skipped,
            )


def place_name(name: str, place: Place) -> str:
    """The file, and the record in it if there is one."""
    return name + (f":{place.number}" if place.number else "")


def _refuse(error: Invalid, skip: bool, skipped: collections.Counter[str]) -> None:
    if not skip:
        raise UserError(
            f"{error}; mend it, or set config.data.skip_invalid=True to skip and count such"
        ) from None
    skipped[error.reason] += 1


class Files:
    """Documents whose tokens are bytes, read where they lie; only an index stays in memory.

    Opening reads everything once: it validates, counts, and computes the fingerprint.

    Attributes:
      lengths: [documents] int64, tokens: bytes.
      fingerprint: sha256 of lengths and contents in order, wherever the files lie.
      skipped: reason -> count of files and records that were left out.
    """

    def __init__(self, files: Sequence[File], config: DataConfig, screen: Screen | None = None):
        self._files, self._config = files, config
        self._tokenizer = ByteTokenizer()
        self.skipped: collections.Counter[str] = collections.Counter()
        index, digest = [], hashlib.sha256()
        for file, place, document in scan(files, config, self.skipped, screen):
            size = sum(len(piece.text) for piece in document)
            index.append((file, *place, size, _checksum(document)))
            digest.update(describe(document))
        self._index = np.array(index, np.int64).reshape(-1, 6)
        self.lengths = self._index[:, 4]
        self.fingerprint = digest.hexdigest()

    def document(self, i: int) -> Document:
        """Raises:
        UserError: it is no longer what it was.
        """
        file, *place, _, checksum = (int(value) for value in self._index[i])
        path, form = self._files[file].path, format_of(self._files[file].path)
        assert at_random(form), path
        try:
            raw = form.read(path, Place(*place), self._config)
            document = form.parse(raw, self._config, self.name(i))
        except (OSError, RuntimeError, IndexError, Invalid):
            document = ()
        if _checksum(document) != checksum:
            raise UserError(f"{self.name(i)} changed while it was in use; start the run again")
        return document

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Document i between two boundaries, and the loss's weight of each token as a target.

        [length + 2] int32 and float32.
        """
        return encode_documents([self.document(i)], self._tokenizer)[0]

    def name(self, i: int) -> str:
        """The file, and the record in it, that document i comes from."""
        file, *place = (int(value) for value in self._index[i, :4])
        return place_name(self._files[file].name, Place(*place))


def describe(document: Document) -> bytes:
    """What tells it from any other."""
    if len(document) == 1 and document[0].weight == 1:
        (piece,) = document
        return len(piece.text).to_bytes(8, "little") + piece.text
    return b"".join(
        len(text).to_bytes(8, "little") + text + f"{weight} {marks}".encode()
        for text, weight, marks in document
    )


def _checksum(document: Document) -> int:
    return zlib.crc32(b"".join(piece.text for piece in document))
