"""What documents are to packing, and which of them are held out."""

import collections
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

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


class Corpus(Protocol):
    """Documents at random.

    Attributes:
      lengths: [documents] int64, tokens without the boundaries.
      fingerprint: of lengths and contents in order, wherever the files lie.
      skipped: reason -> count of files and records that were left out.
    """

    lengths: np.ndarray
    fingerprint: str
    skipped: collections.Counter[str]

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Document i between two boundaries, and the loss's weight of each token as a target.

        [length + 2] int32 and float32.
        """
        ...

    def name(self, i: int) -> str:
        """Where document i comes from."""
        ...


def split_holdout(parts: Sequence[Corpus], every: int) -> tuple[list[list[Span]], list[Span]]:
    """Training spans of each part, and held-out spans; together every prediction once.

    Documents are counted through all parts. Every `every`-th document of a part is held out whole.
    A part of fewer documents, such as one big file, holds out the last 1 / `every` of each
    document. 0 holds out nothing. The long documents of a part of few are several training spans
    each.
    """
    groups: list[list[Span]] = []
    held_out: list[Span] = []
    first = 0
    for part in parts:
        training, of_part = _split(part, first, every)
        if len(part.lengths) < FEW_DOCUMENTS:
            total = sum(span.stop - span.start for span in training)
            size = max(SHORTEST_CUT, -(-total // FEW_DOCUMENTS))
            training = [
                Span(document, cut, min(cut + size, stop))
                for document, start, stop in training
                for cut in range(start, stop, size)
            ]
        groups.append(training)
        held_out += of_part
        first += len(part.lengths)
    return groups, held_out


def _split(part: Corpus, first: int, every: int) -> tuple[list[Span], list[Span]]:
    whole = [Span(first + i, 0, int(length) + 1) for i, length in enumerate(part.lengths)]
    if not every:
        return whole, []
    if len(whole) >= every:
        return (
            [span for i, span in enumerate(whole, start=1) if i % every],
            [span for i, span in enumerate(whole, start=1) if i % every == 0],
        )
    cuts = [span.stop - max(1, span.stop // every) for span in whole]
    return (
        [Span(s.document, 0, cut) for s, cut in zip(whole, cuts, strict=True) if cut],
        [Span(s.document, cut, s.stop) for s, cut in zip(whole, cuts, strict=True)],
    )
