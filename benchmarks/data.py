"""How fast documents become packed rows on one core, how full, and how soon a run resumes.

    python -m benchmarks.data [--source=GLOB] [--tokenizer=bytes] [--length=4096] [--bins=512]
        [--documents=1000000]

Packers of one source in one process, one after the other: ours as a run reads (files of bytes; for
other tokenizers a folder of tokens made before) and from memory; Grain's best fit; and what is
commonly written with the package `datasets`, if it is there: map with a tokenizer, concatenate,
split. Then places to go on from, and documents of Zipf lengths. Seconds are the CPU's, so that what
else the machine does counts for little.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from moe_jax.config import Config, DataConfig, Stage, TrainingConfig
from moe_jax.data.corpus import Span, split_holdout
from moe_jax.data.files import list_files, scan
from moe_jax.data.loader import train_batches
from moe_jax.data.packing import pack_once
from moe_jax.data.sources import Mixture, open_corpus
from moe_jax.data.tokenizer import encode_documents

ROWS = 8
PACKINGS = ("best_fit", "concatenate", "none")


class Lengths:
    """A corpus of documents without content."""

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        size = int(self.lengths[i]) + 2
        return np.ones(size, np.int32), np.ones(size, np.float32)


class Tokens:
    """A corpus in memory."""

    def __init__(self, documents: list[tuple[np.ndarray, np.ndarray]]):
        self._documents = documents

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self._documents[i]


def timed(name: str, rows: Iterator[Any], field: str, length: int, before: float = 0.0) -> float:
    """Shows tokens a second and how full rows are.

    Args:
      before: seconds that were needed to have what rows are made of.
    Returns:
      The seconds that the rows took.
    """
    begin, used, count = time.process_time(), 0, 0
    for row in rows:
        used += np.count_nonzero(row[field])
        count += 1
    seconds = time.process_time() - begin
    speed, full = used / (before + seconds) / 1e6, used / count / length
    print(f"{name:<34}{speed:8.2f}M tokens/s{full:9.2%} full", flush=True)
    return seconds


def cut_share(rows: Iterator[Any], boundary: int) -> float:
    """The share of documents that are in more than one piece, of rows that hold each whole one."""
    documents = cut = 0
    for row in rows:
        borders = np.flatnonzero(np.diff(row["segment_ids"], prepend=0, append=0))
        for start, stop in itertools.pairwise(borders):
            if row["segment_ids"][start] and row["tokens"][start] == boundary:
                documents += 1
                cut += row["targets"][stop - 1] != boundary
    return cut / documents


def whole(corpus: Mixture) -> list[Span]:
    return [Span(i, 0, int(length) + 1) for i, length in enumerate(corpus.lengths)]


def grains(documents: list[tuple[np.ndarray, np.ndarray]], length: int, bins: int) -> Any:
    """Of the same pieces, with inputs, targets and weights."""
    pieces = [
        {"tokens": ids[a:b], "targets": ids[a + 1 : b + 1], "weights": weights[a + 1 : b + 1]}
        for ids, weights in documents
        for a in range(0, len(ids) - 1, length)
        for b in [min(a + length, len(ids) - 1)]
    ]
    return grain.experimental.BestFitPackIterDataset(
        grain.MapDataset.source(pieces).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        ),
        length_struct=dict.fromkeys(("tokens", "targets", "weights"), length),
        num_packing_bins=bins,
    )


def common(texts: list[bytes], encode: Any, boundary: int, length: int) -> None:
    """A `datasets` pipeline: a tokenizer, then all concatenated and split."""
    try:
        import datasets
    except ImportError:
        print("the package datasets is not there: its pipeline is left out")
        return
    datasets.disable_progress_bars()

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = encode([text.encode() for text in batch["text"]])
        return {"ids": [[boundary, *of_text.tolist()] for of_text in ids]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = list(itertools.chain.from_iterable(batch["ids"]))
        stop = len(joined) // length * length
        rows = [joined[i : i + length] for i in range(0, stop, length)]
        return {"tokens": rows, "labels": [list(row) for row in rows]}

    def rows() -> Iterator[Any]:
        joined = table.map(group, batched=True, remove_columns=["ids"], new_fingerprint="joined")
        for row in joined.with_format("numpy"):
            yield {"segment_ids": np.ones_like(row["tokens"]), **row}

    table = datasets.Dataset.from_dict({"text": [text.decode() for text in texts]})
    begin = time.process_time()
    table = table.map(tokenize, batched=True, remove_columns=["text"], new_fingerprint="ids")
    seconds = time.process_time() - begin
    taken = timed("datasets, ids in memory", rows(), "segment_ids", length)
    size = sum(map(len, table["ids"]))
    speed = size / (seconds + taken) / 1e6
    print(f"{'datasets, from texts in memory':<34}{speed:8.2f}M tokens/s", flush=True)


def of_source(data: DataConfig, length: int) -> None:
    counter: collections.Counter[str] = collections.Counter()
    files = list_files(data.source if isinstance(data.source, str) else "")
    begin = time.process_time()
    corpus = open_corpus(data)
    opened, tokenizer, spans = time.process_time() - begin, corpus.tokenizer, whole(corpus)
    found = [each.document for each in scan(files, data, counter)]
    size = sum(len(piece.text) for document in found for piece in document)
    begin = time.process_time()
    documents = [
        text
        for start in range(0, len(found), 100)
        for text in encode_documents(found[start : start + 100], tokenizer)
    ]
    seconds = time.process_time() - begin
    tokens = sum(span.stop for span in spans)
    print(
        f"{data.source}, {data.tokenizer}: {len(spans)} documents, {size / 1e6:.1f} MB, "
        f"{tokens / 1e6:.2f}M tokens; opened in {opened:.1f} s"
    )
    print(f"{'tokenizer alone':<34}{tokens / seconds / 1e6:8.2f}M tokens/s")

    def rows(where: Any, packing: str) -> Iterator[Any]:
        return pack_once(
            where,
            spans,
            length=length,
            packing=packing,
            bins=data.packing_bins,
            mask_documents=True,
        )

    for packing in PACKINGS:
        timed(f"{packing}, as a run reads", rows(corpus, packing), "segment_ids", length)
    memory = Tokens(documents)
    timed("best_fit, ids in memory", rows(memory, "best_fit"), "segment_ids", length)
    theirs = iter(grains(documents, length, data.packing_bins))
    timed("Grain's, ids in memory", theirs, "tokens_segment_ids", length)
    timed(
        "best_fit, from texts in memory", rows(memory, "best_fit"), "segment_ids", length, seconds
    )
    texts = [b"".join(piece.text for piece in document) for document in found]
    common(texts, tokenizer.encode, tokenizer.boundary, length)
    shares = [
        f"{packing} {cut_share(rows(corpus, packing), tokenizer.boundary):.1%}"
        for packing in PACKINGS
    ]
    print(f"{'documents cut':<34}{', '.join(shares)}")


def of_places(data: DataConfig, length: int) -> None:
    data = dataclasses.replace(data, stages=(Stage(length),), prefetch=0)
    config = Config(data=data, training=TrainingConfig(tokens_per_step=ROWS * length))
    corpus = open_corpus(config.data)
    groups, _ = split_holdout(corpus.parts, config.data.holdout_every)

    def batches() -> Any:
        return contextlib.closing(train_batches(config, corpus, groups, (0, 1, 1)))

    with batches() as iterator:
        used = [
            np.count_nonzero(next(iterator)["segment_ids"]) for _ in range(data.packing_bins // 2)
        ]
        state = iterator.get_state()
    full = sum(used) / len(used) / config.training.tokens_per_step
    print(f"{'rows of a run, best_fit':<34}{full:28.2%} full")
    far = json.loads(json.dumps(state))
    far["step"] = 1_000_000
    for stream in far["streams"].values():
        spans = stream["draws"]["spans"]
        stream["draws"]["spans"] = [count + 8 * 10**6 for count in spans]
    for name, each in (("goes on here", state), ("goes on at step 1,000,000", far)):
        with batches() as iterator:
            begin = time.process_time()
            iterator.set_state(each)
            next(iterator)
            print(f"{name:<34}{time.process_time() - begin:8.2f} s, {data.num_streams} streams")
    print(f"{'state':<34}{len(json.dumps(state)):8} bytes")


def of_zipf(documents: int, length: int, bins: int) -> None:
    lengths = np.minimum(np.random.default_rng(0).zipf(1.5, documents), 10**5)
    spans = [Span(i, 0, int(n) + 1) for i, n in enumerate(lengths)]
    begin, used, rows = time.process_time(), 0, 0
    corpus: Any = Lengths(lengths)
    for row in pack_once(
        corpus, spans, length=length, packing="best_fit", bins=bins, mask_documents=True
    ):
        used += np.count_nonzero(row["segment_ids"])
        rows += 1
    seconds = time.process_time() - begin
    assert used == sum(span.stop for span in spans), "every prediction once"
    print(
        f"{documents} documents of Zipf lengths in {seconds:.1f} s: {used / seconds / 1e6:.2f}M "
        f"tokens/s, {used / rows / length:.2%} of rows full, "
        f"{np.mean(lengths + 1 > length):.3%} of documents cut"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--bins", type=int, default=512)
    parser.add_argument("--documents", type=int, default=1_000_000)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    data = DataConfig(
        source=str(Path(arguments.source).expanduser()),
        tokenizer=arguments.tokenizer,
        text_field=arguments.text_field,
        packing_bins=arguments.bins,
        skip_invalid=True,
    )
    of_source(data, arguments.length)
    of_places(data, arguments.length)
    if arguments.documents:
        of_zipf(arguments.documents, arguments.length, arguments.bins)


if __name__ == "__main__":
    main()
