"""Which n-grams of a benchmark's items occur in a text.

Words are runs of letters, digits and underscores, in lower case; characters are all but white
space, in lower case. An item of fewer than n of them is one n-gram as a whole. Time is linear in
the text; memory grows with the benchmark alone.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.documents import Document, Invalid
from moe_jax.data.files import File, Screen, list_files, place_name
from moe_jax.data.formats import JsonLines, Text, format_of
from moe_jax.fields import UserError

FORMS = {"words": re.compile(r"\w+"), "characters": re.compile(r"\S")}
PIECE = 1 << 20  # characters of a text that are looked at at a time
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, of no pattern


class Item(NamedTuple):
    """Of a benchmark."""

    name: str
    text: str


class Ngrams:
    """Those of all items, hashed.

    Args:
      kind: "words:13", "characters:50".
    Attributes:
      of_item: [n-grams] int64 of each item, numbers of its n-grams; equal ones have one number.
      texts: each n-gram.

    Raises:
      UserError: `kind` is none, or an item has nothing to compare.
    """

    def __init__(self, items: Sequence[Item], kind: str):
        form, _, size = kind.partition(":")
        if form not in FORMS or not size.isdecimal() or not int(size):
            raise UserError(
                f"n-grams of {kind!r} are none; give words:13, characters:50 or the like"
            )
        self._pattern, self._n = FORMS[form], int(size)
        self._glue = " " if form == "words" else ""
        numbers: dict[str, int] = {}
        self.of_item = []
        by_length: dict[int, dict[int, int]] = {}
        for item in items:
            symbols = self._pattern.findall(item.text.lower())
            if not symbols:
                raise UserError(f"{item.name} has no {form} to compare")
            n = min(self._n, len(symbols))
            grams = [self._glue.join(symbols[i : i + n]) for i in range(len(symbols) - n + 1)]
            ids = [numbers.setdefault(gram, len(numbers)) for gram in grams]
            hashes = _rolling(_hashes(symbols), n).tolist()
            by_length.setdefault(n, {}).update(zip(hashes, ids, strict=True))
            self.of_item.append(np.unique(ids))
        self.texts = list(numbers)
        self._tables = [(n, _Table(of_length)) for n, of_length in by_length.items()]

    def find(self, text: str) -> set[int]:
        """Numbers of the n-grams that occur in a text."""
        found: set[int] = set()
        tail: list[str] = []
        for piece in _pieces(text):
            symbols = tail + self._pattern.findall(piece.lower())
            hashes = _hashes(symbols)
            for n, table in self._tables:
                for place, number in table.find(_rolling(hashes, n)):
                    # Equal hashes are equal n-grams, but for chance.
                    if self._glue.join(symbols[place : place + n]) == self.texts[number]:
                        found.add(number)
            tail = symbols[max(0, len(symbols) - self._n + 1) :]
        return found


class _Table:
    """Numbers by 64-bit hashes; a mask of their upper bits rules most others out at once."""

    def __init__(self, numbers: dict[int, int]):
        self._hashes = np.array(sorted(numbers), np.uint64)
        self._numbers = np.array([numbers[h] for h in sorted(numbers)], np.int64)
        bits = max(10, (32 * len(numbers)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._mask = np.zeros(1 << bits, bool)
        self._mask[self._hashes >> self._shift] = True

    def find(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """Places in `hashes` of those that are known, and their numbers."""
        (places,) = np.nonzero(self._mask[hashes >> self._shift])
        near = np.minimum(np.searchsorted(self._hashes, hashes[places]), len(self._hashes) - 1)
        known = self._hashes[near] == hashes[places]
        yield from zip(places[known].tolist(), self._numbers[near[known]].tolist(), strict=True)


def _hashes(symbols: list[str]) -> np.ndarray:
    return np.fromiter(map(hash, symbols), np.int64, len(symbols)).view(np.uint64)


def _rolling(hashes: np.ndarray, n: int) -> np.ndarray:
    """[symbols - n + 1] uint64: a hash of each n in a row."""
    count = max(0, len(hashes) - n + 1)
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = (total ^ hashes[i : i + count]) * MULTIPLIER
        total ^= total >> np.uint64(32)
    return total


def _pieces(text: str) -> Iterator[str]:
    """The text in parts of about `PIECE`, cut at white space."""
    space, start = re.compile(r"\s"), 0
    while start < len(text):
        cut = space.search(text, start + PIECE) if start + PIECE < len(text) else None
        stop = cut.start() if cut else len(text)
        yield text[start:stop]
        start = stop


def read_benchmark(files: Sequence[File], fields: str) -> list[Item]:
    """Items of text files (one each) and of JSONL (one a line).

    Args:
      fields: of a record, "question,answer"; "" for every text in it.
    Raises:
      UserError: a file is of another kind, or a record lacks a field.
    """
    items = []
    for path, name in files:
        form = format_of(path)
        if not isinstance(form, Text | JsonLines):
            raise UserError(f"the benchmark {name} must be text or JSONL")
        for place, raw in form.scan(path, name, DataConfig()):
            where = place_name(name, place)
            text = raw.decode(errors="replace")
            if isinstance(form, JsonLines):
                text = "\n".join(_texts(text, fields, where))
            items.append(Item(where, text))
    return items


def _texts(line: str, fields: str, where: str) -> list[str]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object")
    if not fields:
        return list(_all_texts(record))
    for field in fields.split(","):
        if field not in record:
            raise UserError(f"{where} has no field {field!r}; it has {', '.join(record)}")
    return [text for field in fields.split(",") for text in _all_texts(record[field])]


def _all_texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _all_texts(part)


def text_of(document: Document) -> str:
    return b"".join(piece.text for piece in document).decode()


def open_screen(config: DataConfig) -> Screen | None:
    """Leaves out documents in which an n-gram of `config.benchmark` occurs; None: there is none.

    Raises:
      UserError: the benchmark cannot be read.
    """
    if config.benchmark is None:
        return None
    files = list_files(config.benchmark, "config.data.benchmark")
    ngrams = Ngrams(read_benchmark(files, config.benchmark_fields), config.benchmark_ngrams)

    def check(document: Document, place: str) -> None:
        if ngrams.find(text_of(document)):
            raise Invalid("contaminated", f"{place} has n-grams of the benchmark")

    return check
