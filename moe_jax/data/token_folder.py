"""Documents as arrays of token ids in a folder: written once, then mapped into memory.

    manifest.json        counts, hashes, the tokenizer, what the documents were made of
    00000.ids.npy        [tokens] the ids of a shard's documents, one after the other, no boundaries
    00000.lengths.npy    [documents] int64
    00000.weights.npy    [tokens] uint8, where not every token weighs 1
    tokenizer.json       or tokenizer.model; none for bytes

A shard is in the manifest once it is whole, so writing goes on from the last one.
"""

import collections
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.data.documents import Document
from moe_jax.data.tokenizer import (
    ByteTokenizer,
    TrainingTokenizer,
    encode_documents,
    load_tokenizer,
)
from moe_jax.fields import UserError, read_json

FORMAT = 1
SHARD_TOKENS = 1 << 26
BATCH_BYTES = 1 << 22  # of text that is encoded at a time
MANIFEST = "manifest.json"

Encoded = tuple[np.ndarray, np.ndarray]


def is_token_folder(path: Path) -> bool:
    return (path / MANIFEST).is_file()


class TokenFolder:
    """Documents of a folder, at random.

    Attributes:
      lengths: [documents] int64, tokens.
      fingerprint: sha256 of all arrays and the tokenizer.
      skipped: reason -> count of files and records that were left out.
      tokenizer: that the ids are of.

    Raises:
      UserError: the folder is not whole.
    """

    def __init__(self, folder: Path):
        self._folder, manifest = folder, read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}; "
                "tokenize again"
            )
        if not manifest["complete"]:
            raise UserError(
                f"{folder} is not whole: {len(manifest['shards'])} shards were written; run "
                "moe_jax.tokenize again, which goes on from there"
            )
        self.fingerprint = _fingerprint(manifest)
        self.skipped = collections.Counter(manifest["skipped"])
        self._boundary = manifest["tokenizer"]["boundary"]
        kind = manifest["tokenizer"]["kind"]
        self.tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(str(folder))
        shards = manifest["shards"]
        self._ids = [self._array(shard, "ids", shard["tokens"]) for shard in shards]
        self._weights = [
            self._array(shard, "weights", shard["tokens"]) if "weights" in shard["sha256"] else None
            for shard in shards
        ]
        lengths = [self._array(shard, "lengths", shard["documents"]) for shard in shards]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
        # Where a document's tokens begin in its shard, and a shard's documents among all.
        self._starts = np.concatenate(
            [np.zeros(0, np.int64), *(np.cumsum(part) - part for part in lengths)]
        )
        self._first = np.cumsum([0, *map(len, lengths)])

    def tokens(self, i: int) -> Encoded:
        """Document i between two boundaries, and the loss's weight of each token as a target.

        [length + 2] int32 and float32.
        """
        shard = int(np.searchsorted(self._first, i, "right")) - 1
        start, length = int(self._starts[i]), int(self.lengths[i])
        ids = np.full(length + 2, self._boundary, np.int32)
        ids[1:-1] = self._ids[shard][start : start + length]
        weights = np.ones(length + 2, np.float32)
        given = self._weights[shard]
        if given is not None and length:
            weights[1:-1] = given[start : start + length]
            weights[-1] = weights[-2]
        return ids, weights

    def name(self, i: int) -> str:
        return f"{self._folder}:{i + 1}"

    def _array(self, shard: dict[str, Any], kind: str, size: int) -> np.ndarray:
        file = self._folder / f"{shard['name']}.{kind}.npy"
        try:
            array = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}; tokenize again") from None
        if array.shape != (size,):
            raise UserError(
                f"{file} has {array.size} items and the manifest says {size}; tokenize again"
            )
        return array


def write_token_folder(
    folder: Path,
    documents: Callable[[collections.Counter[str]], Iterable[Document]],
    tokenizer: TrainingTokenizer,
    about: dict[str, Any],
    *,
    weighted: bool,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Makes a folder of tokens, or the rest of one that was begun.

    Args:
      documents: all of them, the same each time; counts what it leaves out.
      about: what the documents are made of; a folder that was begun with another is refused.
      weighted: whether documents have tokens that do not weigh 1.
      shard_tokens: after which a shard ends, with a document.
    Raises:
      UserError: there is something else at the place.
    """
    kind = "bytes" if isinstance(tokenizer, ByteTokenizer) else "file"
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "complete": False,
        "documents": 0,
        "tokens": 0,
        "dtype": np.dtype(np.uint8 if kind == "bytes" else dtype).name,
        "tokenizer": {
            "kind": kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "boundary": tokenizer.boundary,
        },
        "about": json.loads(json.dumps(about)),
        "skipped": {},
        "shards": [],
    }
    if is_token_folder(folder):
        begun = read_json(folder / MANIFEST)
        for name in ("format", "tokenizer", "about"):
            if begun.get(name) != manifest[name]:
                raise UserError(
                    f"{folder} holds tokens of something else: {name} is {begun.get(name)!r}, not "
                    f"{manifest[name]!r}; give another folder or remove it"
                )
        if begun["complete"]:
            return
        manifest = begun
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and holds no tokens; give another or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)

    skipped: collections.Counter[str] = collections.Counter()
    left = iter(documents(skipped))
    collections.deque(itertools.islice(left, manifest["documents"]), maxlen=0)  # done before
    pending: list[Encoded] = []
    tokens = 0
    for encoded in _encode_ahead(left, tokenizer):
        pending.append(encoded)
        tokens += len(encoded[0]) - 2
        if tokens >= shard_tokens:
            _write_shard(folder, manifest, pending, weighted)
            pending, tokens = [], 0
    if pending:
        _write_shard(folder, manifest, pending, weighted)
    manifest |= {"complete": True, "skipped": dict(skipped)}
    _write_manifest(folder, manifest)


def _write_shard(
    folder: Path, manifest: dict[str, Any], documents: list[Encoded], weighted: bool
) -> None:
    arrays = {
        "ids": np.concatenate([ids[1:-1] for ids, _ in documents]).astype(manifest["dtype"]),
        "lengths": np.array([len(ids) - 2 for ids, _ in documents], np.int64),
    }
    if weighted:
        arrays["weights"] = np.concatenate([weights[1:-1] for _, weights in documents]).astype(
            np.uint8
        )
    name, hashes = f"{len(manifest['shards']):05}", {}
    for kind, array in arrays.items():
        np.save(folder / f"{name}.{kind}.npy", array)
        hashes[kind] = hashlib.sha256(array.tobytes()).hexdigest()
    count, tokens = len(documents), len(arrays["ids"])
    manifest["shards"].append(
        {"name": name, "documents": count, "tokens": tokens, "sha256": hashes}
    )
    manifest["documents"] += count
    manifest["tokens"] += tokens
    _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(part, folder / MANIFEST)


def _encode_ahead(documents: Iterator[Document], tokenizer: TrainingTokenizer) -> Iterator[Encoded]:
    """Tokens of each; the next batches are read while the libraries encode on all cores."""
    waiting: collections.deque[Future[list[Encoded]]] = collections.deque()
    with ThreadPoolExecutor(2) as pool:
        for batch in itertools.chain(_batches(documents), [None] * 2):
            if batch is not None:
                waiting.append(pool.submit(encode_documents, batch, tokenizer))
            if waiting and (len(waiting) > 2 or batch is None):
                yield from waiting.popleft().result()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += _size(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(document: Document) -> int:
    return sum(len(piece.text) for piece in document)


def _fingerprint(manifest: dict[str, Any]) -> str:
    shards = [shard["sha256"] for shard in manifest["shards"]]
    text = json.dumps([manifest["tokenizer"]["fingerprint"], shards], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
