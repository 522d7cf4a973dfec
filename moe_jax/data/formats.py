"""Kinds of files: text, JSONL, both compressed, Parquet, Arrow (Hugging Face), ArrayRecord.

A file is scanned from front to back. Those that allow it are read at random as well, by what the
scan said of a record's place.
"""

import functools
import gzip
import importlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from moe_jax.config import DataConfig
from moe_jax.data.documents import Document, Invalid, from_json, from_record, from_text
from moe_jax.fields import UserError

ROWS = 1024  # read at a time


class Place(NamedTuple):
    """Where a document lies in its file."""

    number: int  # of the record, from 1; 0: the file is one document
    offset: int = 0  # in bytes, where a format goes by them
    size: int = 0


class Format(Protocol):
    """`random_access`: whether it is an `AtRandom`."""

    random_access: bool

    def scan(self, path: Path, name: str, config: DataConfig) -> Iterator[tuple[Place, Any]]:
        """Records as they lie in the file, for `parse`.

        Raises:
          Invalid: the file, or the rest of it, cannot be read.
        """
        ...

    def parse(self, raw: Any, config: DataConfig, place: str) -> Document: ...


class AtRandom(Format, Protocol):
    def read(self, path: Path, place: Place, config: DataConfig) -> Any:
        """The record at a place that the scan gave, for `parse`."""
        ...


def at_random(form: Format) -> TypeGuard[AtRandom]:
    """Whether records can be read by their place."""
    return form.random_access


class Text:
    """One document, plain or compressed."""

    def __init__(self, compression: str = ""):
        self._compression, self.random_access = compression, not compression

    def scan(self, path: Path, name: str, config: DataConfig) -> Iterator[tuple[Place, bytes]]:
        if config.records != "text":
            raise Invalid(
                "text where chats are wanted",
                f"{name} is text, and config.data.records={config.records!r} wants records",
            )
        with _opened(path, name, self._compression, lambda: "") as file:
            raw = file.read()
        yield Place(0, 0, len(raw)), raw

    def read(self, path: Path, place: Place, config: DataConfig) -> bytes:
        return path.read_bytes()

    def parse(self, raw: bytes, config: DataConfig, place: str) -> Document:
        return from_text(raw, place)


class JsonLines:
    """One document a line, plain or compressed; lines of white space are none."""

    def __init__(self, compression: str = ""):
        self._compression, self.random_access = compression, not compression

    def scan(self, path: Path, name: str, config: DataConfig) -> Iterator[tuple[Place, bytes]]:
        offset = number = found = 0
        with _opened(path, name, self._compression, lambda: f":{number + 1}") as file:
            for raw in file:
                number += 1
                if raw.strip():
                    found += 1
                    yield Place(number, offset, len(raw)), raw
                offset += len(raw)
        if not found:
            raise Invalid("empty file", f"{name} is empty")

    def read(self, path: Path, place: Place, config: DataConfig) -> bytes:
        with open(path, "rb") as file:
            file.seek(place.offset)
            return file.read(place.size)

    def parse(self, raw: bytes, config: DataConfig, place: str) -> Document:
        return from_json(raw, config, place)


class Parquet:
    """One document a row. A row is not read without its row group, so there is no random access."""

    random_access = False

    def scan(self, path: Path, name: str, config: DataConfig) -> Iterator[tuple[Place, Any]]:
        parquet, number = _library("pyarrow.parquet", name, "data"), 0
        try:
            with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                columns = _columns(file.schema_arrow.names, config, name)
                for batch in file.iter_batches(ROWS, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield Place(number), row
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise _broken(error, name, "Parquet", number) from None
        if not number:
            raise Invalid("empty file", f"{name} has no rows")

    def parse(self, raw: Any, config: DataConfig, place: str) -> Document:
        return from_record(raw, config, place)


class Arrow(Parquet):
    """One document a row, as Hugging Face `datasets` keeps them; the file is mapped into memory."""

    random_access = True

    def scan(self, path: Path, name: str, config: DataConfig) -> Iterator[tuple[Place, Any]]:
        _library("pyarrow", name, "data")
        number = 0
        try:
            table = _arrow_table(path)
            table = table.select(_columns(table.column_names, config, name))
            for batch in table.to_batches(max_chunksize=ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(number), row
        except (OSError, ValueError) as error:
            raise _broken(error, name, "Arrow", number) from None
        if not number:
            raise Invalid("empty file", f"{name} has no rows")

    def read(self, path: Path, place: Place, config: DataConfig) -> Any:
        table = _arrow_table(path)
        table = table.select(_columns(table.column_names, config, str(path)))
        return table.slice(place.number - 1, 1).to_pylist()[0]


class ArrayRecord:
    """One document a record, a JSON object as in a line of JSONL."""

    random_access = True

    def scan(self, path: Path, name: str, config: DataConfig) -> Iterator[tuple[Place, bytes]]:
        number = 0
        try:
            reader = _array_record(path)
            count = reader.num_records()
            for start in range(0, count, ROWS):
                for raw in reader.read(list(range(start, min(start + ROWS, count)))):
                    number += 1
                    yield Place(number), raw
        except RuntimeError as error:  # the library raises no other class
            raise _broken(error, name, "ArrayRecord", number) from None
        if not number:
            raise Invalid("empty file", f"{name} has no records")

    def read(self, path: Path, place: Place, config: DataConfig) -> bytes:
        return _array_record(path).read([place.number - 1])[0]

    def parse(self, raw: bytes, config: DataConfig, place: str) -> Document:
        return from_json(raw, config, place)


RECORDS: dict[str, Format] = {
    ".jsonl": JsonLines(),
    **{f".{name}{end}": JsonLines(end) for name in ("jsonl", "json") for end in (".gz", ".zst")},
    ".parquet": Parquet(),
    ".arrow": Arrow(),
    ".array_record": ArrayRecord(),
    ".arrayrecord": ArrayRecord(),
}
TEXTS: dict[str, Format] = {".gz": Text(".gz"), ".zst": Text(".zst"), "": Text()}


def format_of(path: Path) -> Format:
    """By the end of its name; text if that says nothing else."""
    ends = (end for end in {**RECORDS, **TEXTS} if path.name.endswith(end))
    return {**RECORDS, **TEXTS}[max(ends, key=len)]


class _opened:
    """A file for reading; what goes wrong is one sentence with the place that `where` gives."""

    def __init__(self, path: Path, name: str, compression: str, where: Any):
        self._path, self._name, self._compression, self._where = path, name, compression, where
        if compression == ".zst":
            self._arrow = _library("pyarrow", name, "data")

    def __enter__(self) -> Any:
        if self._compression == ".gz":
            self._file: Any = gzip.open(self._path)
        elif self._compression == ".zst":
            self._file = io.BufferedReader(
                self._arrow.input_stream(str(self._path), compression="zstd"), 1 << 20
            )
        else:
            self._file = open(self._path, "rb")
        return self._file

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        self._file.close()
        broken = (EOFError, zlib.error, OSError) if self._compression else ()
        if isinstance(error, broken):
            raise Invalid(
                "unreadable file",
                f"{self._name}{self._where()} cannot be read on: the {self._compression} file is "
                f"damaged ({error})",
            ) from None


def _columns(names: list[str], config: DataConfig, place: str) -> list[str]:
    """The fields that documents are made of, those of them that the file has."""
    wanted = {
        "text": [config.text_field],
        "chats": [config.messages_field],
        "pairs": [config.prompt_field, config.answer_field],
    }[config.records]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise Invalid(
            "file without the field",
            f"{place} has no column {missing[0]!r}; it has {', '.join(names)}",
        )
    return wanted


def _broken(error: Exception, name: str, kind: str, number: int) -> Exception:
    """The sentence for a file that its library cannot read from record `number` on."""
    if isinstance(error, UserError):
        return error
    place = f"{name}:{number + 1}" if number else name
    text = " ".join(str(error).split()).rstrip(".")
    return Invalid("unreadable file", f"{place} cannot be read as {kind}: {text}")


def _library(module: str, name: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"{name} needs the package {package}, which is not installed; "
            f'run pip install "moe_jax[{extra}]"'
        ) from None


@functools.lru_cache(64)
def _arrow_table(path: Path) -> Any:
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all()


@functools.lru_cache(64)
def _array_record(path: Path) -> Any:
    reader = array_record_module.ArrayRecordReader(str(path))
    reader.num_records()  # a file that is none is opened all the same, and says so here
    return reader
