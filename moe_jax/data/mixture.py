"""Which span comes next: a weighted mixture of sources, each in epochs of its own."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from moe_jax.data.corpus import Span

State = dict[str, Any]


class Draws:
    """What stream `index` of `num_streams` draws: an endless sequence of spans.

    The spans of each source come in an order shuffled anew each epoch, of which each stream takes
    every `num_streams`-th. The next is of the source that is furthest behind its weight, counted in
    tokens; so shares of tokens hold at any time, to within a span.

    Args:
      groups: spans of each source, none of them empty.
      weights: share of the tokens of each source; they sum to 1, and 0 is never drawn.
      seed: of the orders.

    Attributes:
      state: {"spans", "tokens", "behind"}, lists with an item for each source: spans and tokens
        that were drawn of it, and tokens that it is behind its weight. Small, and all there is.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Span]],
        weights: Sequence[float],
        *,
        index: int,
        num_streams: int,
        seed: int,
    ):
        self.weights = weights
        self._orders = [
            grain.MapDataset.source(spans).seed((seed + i) % 2**63).shuffle().repeat()
            for i, spans in enumerate(groups)
        ]
        self._index, self._num_streams = index, num_streams
        # Streams start up to about a span apart, or all would draw of the same source at a time.
        apart = np.random.default_rng([seed, index]).random(len(groups))
        self.state: State = {
            "spans": [0] * len(groups),
            "tokens": [0] * len(groups),
            "behind": [float(x) * _usual(spans) for x, spans in zip(apart, groups, strict=True)],
        }

    def __next__(self) -> Span:
        spans, tokens, behind = self.state["spans"], self.state["tokens"], self.state["behind"]
        source = max(
            (i for i, weight in enumerate(self.weights) if weight > 0), key=behind.__getitem__
        )
        span = self._orders[source][self._index + self._num_streams * spans[source]]
        length = span.stop - span.start
        spans[source] += 1
        tokens[source] += length
        for i, weight in enumerate(self.weights):
            behind[i] += weight * length
        behind[source] -= length
        return span


class InOrder:
    """Every span once; for `state` see `Draws`."""

    def __init__(self, spans: Sequence[Span]):
        self._spans = spans
        self.state: State = {"spans": [0]}

    def __next__(self) -> Span:
        (drawn,) = self.state["spans"]
        if drawn == len(self._spans):
            raise StopIteration
        self.state["spans"] = [drawn + 1]
        return self._spans[drawn]


def _usual(spans: Sequence[Span]) -> float:
    """The mean length, of some of them."""
    some = spans[:: 1 + len(spans) // 100]
    return sum(span.stop - span.start for span in some) / len(some)
