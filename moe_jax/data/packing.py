"""Packs documents into rows of a fixed length, as an endless stream that can be stopped anywhere.

Grain's best-fit packer fills a group of rows at a time. Its length is fixed and its state points
to the start of the open group, so what is ours is the cutting of long documents, and the border
between two lengths: what was drawn for the open group and not handed out goes back to the front.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from moe_jax.data.corpus import Corpus, Span
from moe_jax.data.mixture import Draws, InOrder

Row = dict[str, np.ndarray]
State = dict[str, Any]


class SpanReader:
    """Tokens of spans; remembers the last document, since its pieces come one after the other."""

    def __init__(self, corpus: Corpus):
        self._corpus = corpus
        self._document: int | None = None
        self._tokens, self._weights = np.zeros(0, np.int32), np.zeros(0, np.float32)

    def read(self, span: Span) -> Row:
        """`tokens`, `targets` [length] int32, the latter's `weights` float32; `span` [3] int64."""
        if span.document != self._document:
            self._tokens, self._weights = self._corpus.tokens(span.document)
            self._document = span.document
        inputs, targets = slice(span.start, span.stop), slice(span.start + 1, span.stop + 1)
        return {
            "tokens": self._tokens[inputs],
            "targets": self._tokens[targets],
            "weights": self._weights[targets],
            "span": np.array(span, np.int64),
        }


class _PieceIterator(grain.DatasetIterator):
    """Spans cut to pieces of at most `length`: first those put back, then what `draws` brings. The
    state is {"front": spans not yet cut, "drawn": the state of the draws}."""

    def __init__(self, draws: Draws | InOrder, reader: SpanReader, length: int):
        super().__init__()
        self._draws, self._reader, self._length = draws, reader, length
        self._front: list[Span] = []

    def next_span(self) -> Span:
        if not self._front:
            self._front = [next(self._draws)]
        document, start, stop = self._front[0]
        cut = min(start + self._length, stop)
        self._front[:1] = [Span(document, cut, stop)] if cut < stop else []
        return Span(document, start, cut)

    def __next__(self) -> Row:
        return self._reader.read(self.next_span())

    def get_state(self) -> State:
        drawn = {name: list(values) for name, values in self._draws.state.items()}
        return {"front": [list(span) for span in self._front], "drawn": drawn}

    def set_state(self, state: State) -> None:
        self._front = [Span(*span) for span in state["front"]]
        self._draws.state = {name: list(values) for name, values in state["drawn"].items()}


class _Pieces(grain.IterDataset):
    def __init__(self, draws: Callable[[], Draws | InOrder], reader: SpanReader, length: int):
        super().__init__()
        self._draws, self._reader, self._length = draws, reader, length

    def __iter__(self) -> _PieceIterator:
        return _PieceIterator(self._draws(), self._reader, self._length)


def _rows(pieces: _Pieces, length: int, bins: int, shuffle: bool):
    return iter(
        grain.experimental.BestFitPackIterDataset(
            pieces,
            length_struct={"tokens": length, "targets": length, "weights": length},
            num_packing_bins=bins,
            shuffle_bins=shuffle,
            meta_features=["span"],
        )
    )


def _finish(packed: dict[str, Any], mask_documents: bool) -> Row:
    """A packer's row in the form that the model takes: five arrays [length]."""
    segment_ids = packed["tokens_segment_ids"].astype(np.int32)
    positions = packed["tokens_positions"].astype(np.int32)
    if not mask_documents:
        # The row is one text: attention crosses documents, so positions must not restart.
        segment_ids = (segment_ids > 0).astype(np.int32)
        positions = np.arange(len(positions), dtype=np.int32)
    return {
        "tokens": packed["tokens"].astype(np.int32),
        "targets": packed["targets"].astype(np.int32),
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_weights": packed["weights"].astype(np.float32),
    }


def tokens_drawn(states: Iterable[State]) -> list[int]:
    """Of each source, by all streams in these states together."""
    of_streams = [state["parent"]["drawn"]["tokens"] for state in states]
    return [sum(of_source) for of_source in zip(*of_streams, strict=True)]


class Stream:
    """Logical stream `index` of `num_streams`: an endless sequence of packed rows.

    A row is a dict of arrays [length]: `tokens` and `targets` int32 (the next token of the same
    document), `segment_ids` int32 (from 1 on; 0 is padding), `positions` int32, `loss_weights`
    float32 (of targets; 0 on padding). Every prediction that is drawn comes out once. The rows that
    the packer fills at a time come out in a shuffled order, and with them the pieces of a document.

    Args:
      groups, weights: what the streams share out, see `Draws`.
      bins: rows that the packer fills at a time.
      length: of a row, in tokens.
      state: of `get_state`, to go on from there.
    """

    def __init__(
        self,
        corpus: Corpus,
        groups: Sequence[Sequence[Span]],
        weights: Sequence[float],
        *,
        index: int,
        num_streams: int,
        seed: int,
        bins: int,
        length: int,
        state: State | None = None,
    ):
        self._reader = SpanReader(corpus)
        self._draws = functools.partial(
            Draws, groups, weights, index=index, num_streams=num_streams, seed=seed
        )
        self._bins, self._length = bins, length
        self._packer = self._open(state)

    def _pieces(self) -> _Pieces:
        return _Pieces(self._draws, self._reader, self._length)

    def _open(self, state: State | None):
        packer = _rows(self._pieces(), self._length, self._bins, shuffle=True)
        if state is not None:
            packer.set_state(state)
        return packer

    def next_row(self, mask_documents: bool = True) -> Row:
        """One more row, its documents segments of their own or, without masks, one text."""
        return _finish(next(self._packer), mask_documents)

    def get_state(self) -> State:
        """A small JSON-able document."""
        return self._packer.get_state()

    def set_length(self, length: int) -> None:
        """Goes on with rows of another length; what no row has brought yet comes first."""
        state = self.get_state()
        group, taken, counter = state["parent"], state["next_row"], state["counter"]
        repacked = self._open({"parent": group, "next_row": 0, "counter": counter - taken})
        # A small corpus comes round within one group, and brings the same span again.
        used = Counter(Span(*span) for _ in range(taken) for span in next(repacked)["span"])

        pieces = iter(self._pieces())
        pieces.set_state(group)
        unused: list[Span] = []
        while used.total():
            span = pieces.next_span()
            if used[span]:
                used[span] -= 1
            else:
                unused.append(span)
        rest = pieces.get_state()
        front = _merge([*unused, *(Span(*span) for span in rest["front"])])
        self._length = length
        self._packer = self._open(
            {
                "parent": {**rest, "front": [list(span) for span in front]},
                "next_row": 0,
                "counter": counter,
            }
        )


def _merge(spans: Sequence[Span]) -> list[Span]:
    """Neighbouring parts of one document as one span again."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].document == span.document and merged[-1].stop == span.start:
            merged[-1] = merged[-1]._replace(stop=span.stop)
        else:
            merged.append(span)
    return merged


def pack_once(
    corpus: Corpus, spans: Sequence[Span], *, length: int, bins: int, mask_documents: bool
) -> Iterator[Row]:
    """Rows of all spans, in order, once."""
    reader = SpanReader(corpus)
    pieces = _Pieces(lambda: InOrder(spans), reader, length)
    for packed in _rows(pieces, length, bins, shuffle=False):
        yield _finish(packed, mask_documents)
