"""How fast documents become packed batches on one core, how full, and how soon a run resumes.

    python -m benchmarks.data [--source=stdlib] [--length=4096] [--bins=512] [--documents=1000000]

First on a source; then documents whose lengths follow Zipf's law, of one token repeated, once
through the packer.
"""

import argparse
import contextlib
import json
import time
from typing import Any

import numpy as np

from moe_jax.config import Config, DataConfig, Stage, TrainingConfig
from moe_jax.data.corpus import Span, split_holdout
from moe_jax.data.loader import train_batches
from moe_jax.data.packing import pack_once
from moe_jax.data.sources import open_corpus

ROWS = 8


class Lengths:
    """A corpus of documents without content."""

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        size = int(self.lengths[i]) + 2
        return np.ones(size, np.int32), np.ones(size, np.float32)


def batches(config: Config, state: dict[str, Any] | None = None) -> Any:
    corpus = open_corpus(config.data)
    groups, _ = split_holdout(corpus.parts, config.data.holdout_every)
    return train_batches(config, corpus, groups, (0, 1, 1), state)


def of_source(source: str, length: int, bins: int) -> None:
    config = Config(
        data=DataConfig(
            source=source, stages=(Stage(length),), prefetch=0, num_streams=1, packing_bins=bins
        ),
        training=TrainingConfig(tokens_per_step=ROWS * length),
    )
    with contextlib.closing(batches(config)) as iterator:
        next(iterator)
        begin, used, seen = time.perf_counter(), 0, 0
        while time.perf_counter() - begin < 10:
            batch = next(iterator)
            used += np.count_nonzero(batch["segment_ids"])
            seen += batch["segment_ids"].size
        seconds = time.perf_counter() - begin
        state = iterator.get_state()
    print(
        f"{source}: {used / seconds / 1e6:.2f}M tokens/s of a core, {used / seen:.2%} of rows full"
    )
    far = json.loads(json.dumps(state))
    far["step"] = 1_000_000
    (stream,) = far["streams"].values()
    drawn = stream["draws"]
    drawn["spans"] = [count + 8 * 10**6 for count in drawn["spans"]]
    for name, each in (("here", state), ("at step 1,000,000", far)):
        with contextlib.closing(batches(config)) as iterator:
            begin = time.perf_counter()
            iterator.set_state(each)
            next(iterator)
            print(f"    goes on {name} after {time.perf_counter() - begin:.2f} s")
    print(f"    state of {len(json.dumps(state))} bytes")


def of_zipf(documents: int, length: int, bins: int) -> None:
    lengths = np.minimum(np.random.default_rng(0).zipf(1.5, documents), 10**5)
    spans = [Span(i, 0, int(n) + 1) for i, n in enumerate(lengths)]
    begin, used, rows = time.perf_counter(), 0, 0
    corpus: Any = Lengths(lengths)
    for row in pack_once(
        corpus, spans, length=length, packing="best_fit", bins=bins, mask_documents=True
    ):
        used += np.count_nonzero(row["segment_ids"])
        rows += 1
    seconds = time.perf_counter() - begin
    assert used == sum(span.stop for span in spans), "every prediction once"
    print(
        f"{documents} documents of Zipf lengths in {seconds:.0f} s: {used / seconds / 1e6:.2f}M "
        f"tokens/s, {used / rows / length:.2%} of rows full, "
        f"{np.mean(lengths + 1 > length):.3%} of documents cut"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--bins", type=int, default=512)
    parser.add_argument("--documents", type=int, default=1_000_000)
    arguments = parser.parse_args()
    of_source(arguments.source, arguments.length, arguments.bins)
    of_zipf(arguments.documents, arguments.length, arguments.bins)


if __name__ == "__main__":
    main()
