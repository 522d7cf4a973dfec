"""Packs documents into rows of a fixed length, as an endless stream that can be stopped anywhere.

Rows are planned from lengths alone, a group at a time; a document is read when the first row with a
piece of it comes out. So a place in the stream is the start of the open group and a count of its
rows, and going on from there costs no more than planning the group again.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.data.corpus import Corpus, Span
from moe_jax.data.mixture import Draws

Row = dict[str, np.ndarray]
State = dict[str, Any]


def plan(draws: Draws, length: int, packing: str, bins: int) -> tuple[list[Span], list[list[int]]]:
    """The next group of at most `bins` rows: pieces in the order drawn, and which each row has.

    "best_fit" cuts what is longer than a row, and puts each piece where it leaves least room, until
    no row has room for the next. "concatenate" fills row after row with what comes, and cuts where
    they end. "none" has a row for each piece. No rows: all is drawn.
    """
    pieces: list[Span] = []
    rows: list[list[int]] = [[] for _ in range(bins)]
    if packing == "best_fit":
        room = [(length, row) for row in range(bins)]  # sorted
        while piece := draws.take(length):
            size = piece.stop - piece.start
            best = bisect.bisect_left(room, (size, 0))
            if best == bins:
                draws.put_back([piece])
                break
            left, row = room.pop(best)
            bisect.insort(room, (left - size, row))
            rows[row].append(len(pieces))
            pieces.append(piece)
    else:
        for row in rows:
            left = length
            while left and (piece := draws.take(left)):
                left = 0 if packing == "none" else left - (piece.stop - piece.start)
                row.append(len(pieces))
                pieces.append(piece)
    return pieces, [row for row in rows if row]


class _Texts:
    """Tokens and weights of a group's pieces; a document is read once, and only they are kept."""

    def __init__(self, corpus: Corpus, pieces: Sequence[Span]):
        self._corpus, self._pieces = corpus, pieces
        self._read: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._of_document: defaultdict[int, list[int]] = defaultdict(list)
        for i, piece in enumerate(pieces):
            self._of_document[piece.document].append(i)

    def take(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Of piece i [size + 1], the target of its last prediction included; once."""
        if i not in self._read:
            document = self._pieces[i].document
            tokens, weights = self._corpus.tokens(document)
            for j in self._of_document.pop(document):
                part = slice(self._pieces[j].start, self._pieces[j].stop + 1)
                # Copies: a part would keep the whole document.
                self._read[j] = tokens[part].copy(), weights[part].copy()
        return self._read.pop(i)


def _row(texts: Sequence[tuple[np.ndarray, np.ndarray]], length: int, mask_documents: bool) -> Row:
    """Pieces side by side in the form that the model takes: five arrays [length]."""
    sizes = [len(tokens) - 1 for tokens, _ in texts]
    starts, used = np.cumsum([0, *sizes[:-1]]), sum(sizes)
    row: Row = {
        **{name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids")},
        "positions": np.arange(length, dtype=np.int32),
        "loss_weights": np.zeros(length, np.float32),
    }
    np.concatenate([tokens[:-1] for tokens, _ in texts], out=row["tokens"][:used])
    np.concatenate([tokens[1:] for tokens, _ in texts], out=row["targets"][:used])
    np.concatenate([weights[1:] for _, weights in texts], out=row["loss_weights"][:used])
    if mask_documents:
        row["segment_ids"][:used] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        row["positions"][:used] -= np.repeat(starts, sizes)
        row["positions"][used:] = 0
    else:
        # The row is one text: attention crosses documents, so positions must not restart.
        row["segment_ids"][:used] = 1
    return row


def tokens_drawn(states: Iterable[State]) -> list[int]:
    """Of each source, in the rows that all streams in these states have brought."""
    of_streams = [state["tokens"] for state in states]
    return [sum(of_source) for of_source in zip(*of_streams, strict=True)]


class Stream:
    """Logical stream `index` of `num_streams`: an endless sequence of packed rows.

    A row is a dict of arrays [length]: `tokens` and `targets` int32 (the next token of the same
    document), `segment_ids` int32 (from 1 on; 0 is padding), `positions` int32, `loss_weights`
    float32 (of targets; 0 on padding). Every prediction that is drawn comes out once. The rows of
    a group come out in a shuffled order, and with them the pieces of a document.

    Args:
      groups, weights: what the streams share out, see `Draws`.
      packing, bins: see `plan`.
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
        packing: str,
        bins: int,
        length: int,
        state: State | None = None,
    ):
        self._corpus, self._packing, self._bins, self._length = corpus, packing, bins, length
        self._draws = Draws(groups, weights, index=index, num_streams=num_streams, seed=seed)
        # Rows of the groups before, the draws' state then, rows of this group, tokens of all.
        self._before, self._start, self._taken = 0, self._draws.state, 0
        self._tokens = [0] * len(groups)
        self._rows: list[list[int]] = []
        if state is not None:
            self._draws.state = self._start = state["draws"]
            self._before, self._tokens = state["rows"], list(state["tokens"])
            if state["taken"]:
                self._open()
                self._taken = state["taken"]

    def _open(self) -> None:
        self._start = self._draws.state
        self._pieces, rows = plan(self._draws, self._length, self._packing, self._bins)
        self._rows = [
            rows[i] for i in np.random.default_rng(self._before).permuted(range(len(rows)))
        ]
        self._texts = _Texts(self._corpus, self._pieces)

    def next_row(self, mask_documents: bool = True) -> Row:
        """One more row, its documents segments of their own or, without masks, one text."""
        if not self._rows:
            self._open()
        pieces = self._rows[self._taken]
        for piece in (self._pieces[i] for i in pieces):
            self._tokens[self._draws.source(piece)] += piece.stop - piece.start
        self._taken += 1
        row = _row([self._texts.take(i) for i in pieces], self._length, mask_documents)
        if self._taken == len(self._rows):
            self._close()
        return row

    def _close(self) -> None:
        """The next row is of another group."""
        self._before += self._taken
        self._rows, self._taken, self._start = [], 0, self._draws.state

    def get_state(self) -> State:
        """A small JSON-able document."""
        return {
            "draws": self._start,
            "rows": self._before,
            "taken": self._taken,
            "tokens": list(self._tokens),
        }

    def set_stage(self, length: int, weights: Sequence[float]) -> None:
        """Goes on with other rows; what none of those before has brought is put back."""
        if (length, weights) == (self._length, self._draws.weights):
            return
        unused = sorted(i for row in self._rows[self._taken :] for i in row)
        self._draws.put_back(self._pieces[i] for i in unused)
        self._close()
        self._length, self._draws.weights = length, weights


def pack_once(
    corpus: Corpus,
    spans: Sequence[Span],
    *,
    length: int,
    packing: str,
    bins: int,
    mask_documents: bool,
) -> Iterator[Row]:
    """Rows of all spans, in order, once."""
    draws = Draws([spans], [1.0])
    while True:
        pieces, rows = plan(draws, length, packing, bins)
        if not rows:
            return
        texts = _Texts(corpus, pieces)
        for row in rows:
            yield _row([texts.take(i) for i in row], length, mask_documents)
