"""Documents by index: the standard library's source files, or text and JSONL files of a glob.

Opening reads everything once: it validates, counts, and computes the fingerprint. Afterwards only
an index of (file, offset, length) stays in memory.
"""

import collections
import glob
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.config import DataConfig, UserError
from moe_jax.data.tokenizer import ByteTokenizer

# Tests and installed packages differ from machine to machine.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# A corpus of few documents is shared out in about so many spans, of at least so many predictions:
# streams that outnumber the spans would each read the same text at the same step.
FEW_DOCUMENTS = 64
SHORTEST_CUT = 4096


class Span(NamedTuple):
    """Predictions [start, stop) of a document.

    Prediction p has token p as its input and token p + 1 as its target, where token 0 is the
    boundary before the text; so a document of n tokens has n + 1 predictions.
    """

    document: int
    start: int
    stop: int


class Invalid(UserError):
    """A file or line that cannot be used; `reason` is what is counted when it is skipped."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Corpus:
    """Random access to documents: `corpus[i]` is the UTF-8 text of document i, as bytes.

    Attributes:
      lengths: [documents] int64, tokens of text: bytes.
      fingerprint: sha256 of lengths and contents in order, wherever the files lie.
      skipped: reason -> count of files and lines that were left out.
    """

    def __init__(self, paths: list[Path], names: list[str], text_field: str, skip_invalid: bool):
        self._paths = paths
        self._file_names = names
        self._text_field = text_field
        self._tokenizer = ByteTokenizer()
        self.skipped: collections.Counter[str] = collections.Counter()
        index, digest = [], hashlib.sha256()
        for file_id, path in enumerate(paths):
            try:
                for line, offset, size, text in self._documents(file_id, skip_invalid):
                    index.append((file_id, line, offset, size, len(text), zlib.crc32(text)))
                    digest.update(len(text).to_bytes(8, "little") + text)
            except OSError as error:
                self._refuse(
                    Invalid("unreadable file", f"cannot read {path}: {error.strerror}"),
                    skip_invalid,
                )
        self._index = np.array(index, np.int64).reshape(-1, 6)
        self.lengths = self._index[:, 4]
        self.fingerprint = digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> bytes:
        file_id, line, offset, size, _, checksum = (int(value) for value in self._index[i])
        try:
            with open(self._paths[file_id], "rb") as file:
                file.seek(offset)
                raw = file.read(size)
            text = _parse_line(raw, self._text_field, self.name(i)) if line else raw
        except (FileNotFoundError, Invalid):
            text = b""
        if zlib.crc32(text) != checksum:
            raise UserError(f"{self.name(i)} changed while it was in use; start the run again")
        return text

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Document i between two boundaries, and the loss's weight of each token as a target.

        [length + 2] int32 and float32.
        """
        ids = self._tokenizer.encode_document(self[i])
        return ids, np.ones(len(ids), np.float32)

    def name(self, i: int) -> str:
        """The file, and for JSONL the line, that document i comes from."""
        file_id, line = (int(value) for value in self._index[i, :2])
        return self._file_names[file_id] + (f":{line}" if line else "")

    def _documents(self, file_id: int, skip_invalid: bool) -> Iterator[tuple[int, int, int, bytes]]:
        """(line number or 0, offset and size in the file, text) of a file's valid documents."""
        path, name = self._paths[file_id], self._file_names[file_id]
        if path.suffix != ".jsonl":
            raw = path.read_bytes()
            try:
                yield 0, 0, len(raw), _parse_text(raw, name)
            except Invalid as error:
                self._refuse(error, skip_invalid)
            return
        offset, found = 0, False
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    found = True
                    try:
                        text = _parse_line(raw, self._text_field, f"{name}:{number}")
                        yield number, offset, len(raw), text
                    except Invalid as error:
                        self._refuse(error, skip_invalid)
                offset += len(raw)
        if not found:
            self._refuse(Invalid("empty file", f"{name} is empty"), skip_invalid)

    def _refuse(self, error: Invalid, skip_invalid: bool) -> None:
        if not skip_invalid:
            raise UserError(
                f"{error}; mend it, or set config.data.skip_invalid=True to skip and count such"
            ) from None
        self.skipped[error.reason] += 1


def _parse_text(raw: bytes, place: str) -> bytes:
    if not raw:
        raise Invalid("empty file", f"{place} is empty")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Invalid(
            "invalid UTF-8",
            f"{place}:{line} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset "
            f"{error.start} of the file",
        ) from None
    return raw


def _parse_line(raw: bytes, field: str, place: str) -> bytes:
    try:
        record = json.loads(raw.rstrip(b"\r\n"))  # or an error's column is the next line's
    except UnicodeDecodeError as error:
        raise Invalid("invalid UTF-8", f"{place} is not UTF-8 text: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise Invalid(
            "JSONL line that does not parse",
            f"{place} is not JSON: {error.msg} at column {error.colno}",
        ) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep a nest
        raise Invalid("JSONL line that does not parse", f"{place} is not read: {error}") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise Invalid("JSONL line without text", f"{place} is a JSON {kind}, not an object")
    if not isinstance(record.get(field), str) or not record[field]:
        what = "no text in field" if field in record else "no field"
        has = ", ".join(sorted(record)) or "no fields"
        raise Invalid(
            "JSONL line without text",
            f"{place} has {what} {field!r} (config.data.text_field); it has {has}",
        )
    try:
        return record[field].encode()
    except UnicodeEncodeError:
        raise Invalid(
            "invalid UTF-8", f"{place} has half a surrogate pair in field {field!r}"
        ) from None


def open_corpus(config: DataConfig) -> Corpus:
    """The documents of `config.source`.

    Raises:
      ValueError: nothing matches, nothing is left, or a file or line cannot be used and
        `config.skip_invalid` is False.
    """
    if config.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        names = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*.py")
            if not LEFT_OUT & set(path.relative_to(root).parts) and path.is_file()
        )
        # Its empty files are nobody's mistake: they are skipped and counted.
        corpus = Corpus([root / name for name in names], names, config.text_field, True)
    else:
        pattern = os.path.expanduser(config.source)
        names = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        if not names:
            raise UserError(
                f"config.data.source={config.source!r} matches no file; give 'stdlib' or a glob of "
                ".jsonl and text files"
            )
        paths = [Path(name) for name in names]
        corpus = Corpus(paths, names, config.text_field, config.skip_invalid)
    if not len(corpus):
        counts = ", ".join(f"{count} {reason}" for reason, count in corpus.skipped.items())
        raise UserError(f"config.data.source={config.source!r} has no usable document: {counts}")
    return corpus


def split_holdout(corpus: Corpus, every: int) -> tuple[list[Span], list[Span]]:
    """Training and held-out spans; together they are every prediction of the corpus once.

    Every `every`-th document is held out whole. A corpus of fewer documents, such as one big file,
    holds out the last 1 / `every` of each document. 0 holds out nothing. The long documents of a
    corpus of few are several training spans each.
    """
    training, held_out = _split(corpus, every)
    if len(corpus) < FEW_DOCUMENTS:
        total = sum(span.stop - span.start for span in training)
        size = max(SHORTEST_CUT, -(-total // FEW_DOCUMENTS))
        training = [
            Span(document, cut, min(cut + size, stop))
            for document, start, stop in training
            for cut in range(start, stop, size)
        ]
    return training, held_out


def _split(corpus: Corpus, every: int) -> tuple[list[Span], list[Span]]:
    whole = [Span(i, 0, int(length) + 1) for i, length in enumerate(corpus.lengths)]
    if not every:
        return whole, []
    if len(corpus) >= every:
        return (
            [span for i, span in enumerate(whole, start=1) if i % every],
            [span for i, span in enumerate(whole, start=1) if i % every == 0],
        )
    cuts = [span.stop - max(1, span.stop // every) for span in whole]
    return (
        [Span(s.document, 0, cut) for s, cut in zip(whole, cuts, strict=True) if cut],
        [Span(s.document, cut, s.stop) for s, cut in zip(whole, cuts, strict=True)],
    )
