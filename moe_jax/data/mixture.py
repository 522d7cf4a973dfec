"""Which piece comes next: a weighted mixture of sources, each in epochs of its own."""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import grain
import numpy as np

from moe_jax.data.corpus import Span

State = dict[str, Any]


class Draws:
    """What stream `index` of `num_streams` draws: pieces of spans, which it may put back.

    The spans of each source come in an order shuffled anew each epoch, of which each stream takes
    every `num_streams`-th. The next piece is of the source that is furthest behind its weight,
    counted in tokens; so shares of tokens hold at any time, to within a piece.

    Args:
      groups: spans of each source, by their documents, which follow those of the source before.
      weights: share of the tokens of each source; they sum to 1, and 0 is never drawn.
      seed: of the orders; None: once and as they are.

    Attributes:
      weights: may change on the way; what was drawn before is not made up for.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Span]],
        weights: Sequence[float],
        *,
        index: int = 0,
        num_streams: int = 1,
        seed: int | None = None,
    ):
        self.weights = weights
        self._orders = groups if seed is None else _endless(groups, seed)
        self._firsts = [spans[0].document if spans else 0 for spans in groups]
        self._index, self._num_streams = index, num_streams
        self._spans = [0] * len(groups)
        self._front: list[list[Span]] = [[] for _ in groups]
        # Streams start up to about a span apart, or all would draw of the same source at a time.
        apart = np.random.default_rng([seed or 0, index]).random(len(groups))
        self._behind = [float(x) * _usual(spans) for x, spans in zip(apart, groups, strict=True)]

    def take(self, limit: int) -> Span | None:
        """At most `limit` predictions, from the front of a span; None: all orders have ended."""
        drawn = [i for i, weight in enumerate(self.weights) if weight > 0]
        source = max(drawn, key=self._behind.__getitem__)
        front = self._front[source]
        if not front:
            order = self._orders[source]
            place = self._index + self._num_streams * self._spans[source]
            if place >= len(order):
                return None
            self._spans[source] += 1
            front.append(order[place])
        document, start, stop = front[0]
        cut = min(start + limit, stop)
        front[:1] = [Span(document, cut, stop)] if cut < stop else []
        self._count(source, cut - start)
        return Span(document, start, cut)

    def put_back(self, pieces: Iterable[Span]) -> None:
        """These come next of their sources, in this order, as if they had not been drawn."""
        for source, of_source in itertools.groupby(
            sorted(pieces, key=lambda piece: self.source(piece)), key=self.source
        ):
            back = list(of_source)
            self._front[source] = _merge([*back, *self._front[source]])
            self._count(source, -sum(piece.stop - piece.start for piece in back))

    def source(self, piece: Span) -> int:
        """Which source it is of."""
        return bisect_right(self._firsts, piece.document) - 1

    def _count(self, source: int, tokens: int) -> None:
        for i, weight in enumerate(self.weights):
            self._behind[i] += weight * tokens
        self._behind[source] -= tokens

    @property
    def state(self) -> State:
        """All there is, for JSON: of each source the spans drawn, those put back or not drawn to
        their end, and the tokens that it is behind its weight."""
        front = [[list(span) for span in of_source] for of_source in self._front]
        return {"spans": list(self._spans), "front": front, "behind": list(self._behind)}

    @state.setter
    def state(self, state: State) -> None:
        self._spans, self._behind = list(state["spans"]), list(state["behind"])
        self._front = [[Span(*span) for span in of_source] for of_source in state["front"]]


def _endless(groups: Sequence[Sequence[Span]], seed: int) -> list[Any]:
    """Orders that can be entered anywhere."""
    return [
        grain.MapDataset.source(spans).seed((seed + i) % 2**63).shuffle().repeat()
        for i, spans in enumerate(groups)
    ]


def _merge(spans: Sequence[Span]) -> list[Span]:
    """Neighbouring parts of one document as one span again."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].document == span.document and merged[-1].stop == span.start:
            merged[-1] = merged[-1]._replace(stop=span.stop)
        else:
            merged.append(span)
    return merged


def _usual(spans: Sequence[Span]) -> float:
    """The mean length, of some of them."""
    some = spans[:: 1 + len(spans) // 100]
    return sum(span.stop - span.start for span in some) / max(len(some), 1)
