"""Packing loses nothing and repeats nothing, wherever a stream stops or its rows change length."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig
from moe_jax.data.corpus import Span
from moe_jax.data.mixture import Draws
from moe_jax.data.packing import Row, Stream, pack_once, plan
from moe_jax.data.sources import open_corpus
from moe_jax.data.tokenizer import BOUNDARY

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=25)
STRIDE = 10_000  # tokens of one document are numbered from 1 + STRIDE * document
DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_weights": np.float32,
}


class Numbered:
    """Documents whose every token is another number, so that a prediction is known by its input."""

    def __init__(self, lengths: list[int]):
        self.spans = [Span(i, 0, length + 1) for i, length in enumerate(lengths)]

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Every third token has the weight 0.5."""
        first = 1 + STRIDE * i
        ids = np.arange(first, first + self.spans[i].stop + 1, dtype=np.int32)
        return ids, weights_of(ids)


def weights_of(ids: np.ndarray) -> np.ndarray:
    return np.where(ids % 3 == 0, 0.5, 1).astype(np.float32)


def predictions(spans: Any) -> Counter[int]:
    """How often each prediction is in `spans`, by the number of its input token."""
    return Counter(
        1 + STRIDE * document + position
        for document, start, stop in spans
        for position in range(start, stop)
    )


def segments(row: Row, length: int) -> list[list[int]]:
    """A row's pieces as the numbers of their input tokens; the row's form is checked."""
    assert {name: array.dtype for name, array in row.items()} == DTYPES
    assert all(array.shape == (length,) for array in row.values())
    used = int(np.count_nonzero(row["segment_ids"]))
    assert used > 0
    for name in row:
        assert not row[name][used:].any(), f"padding of {name}"
    np.testing.assert_array_equal(row["loss_weights"][:used], weights_of(row["targets"][:used]))
    ids = row["segment_ids"][:used]
    found = []
    for segment in range(1, ids.max() + 1):
        (where,) = np.nonzero(ids == segment)
        tokens = row["tokens"][where]
        assert len(where) == where[-1] - where[0] + 1, "a segment in two parts"
        np.testing.assert_array_equal(row["positions"][where], np.arange(len(where)))
        np.testing.assert_array_equal(tokens, np.arange(tokens[0], tokens[0] + len(where)))
        np.testing.assert_array_equal(row["targets"][where], tokens + 1)
        assert len(set((tokens - 1) // STRIDE)) == 1, "a segment of two documents"
        found.append(tokens.tolist())
    assert sum(map(len, found)) == used
    return found


PACKINGS = ("best_fit", "concatenate", "none")


class Case(NamedTuple):
    """A stream, and when its rows change length: (rows before, length after) in order."""

    lengths: list[int]  # of documents
    row_length: int
    bins: int
    num_streams: int
    index: int
    borders: list[tuple[int, int]]
    seed: int = 0
    packing: str = "best_fit"

    def stream(self, documents: Numbered, **changes: Any) -> Stream:
        arguments: dict[str, Any] = dict(
            index=self.index,
            num_streams=self.num_streams,
            seed=self.seed,
            packing=self.packing,
            bins=self.bins,
            length=self.row_length,
        )
        return Stream(documents, [documents.spans], [1.0], **arguments | changes)  # type: ignore


@st.composite
def cases(draw: Any, max_borders: int = 2) -> Case:
    num_streams = draw(st.integers(1, 4))
    return Case(
        lengths=draw(st.lists(st.integers(1, 12) | st.integers(1, 150), min_size=1, max_size=12)),
        row_length=draw(st.integers(1, 40)),
        bins=draw(st.integers(1, 6)),
        num_streams=num_streams,
        index=draw(st.integers(0, num_streams - 1)),
        borders=draw(
            st.lists(st.tuples(st.integers(0, 14), st.integers(1, 60)), max_size=max_borders)
        ),
        seed=draw(st.integers(0, 3)),
        packing=draw(st.sampled_from(PACKINGS)),
    )


def check_account(came_out: Counter[int], state: dict[str, Any], documents: Numbered) -> None:
    """What came out and what is to come are, together, the whole documents that were drawn."""
    assert state["taken"] == 0, "no row of the open group has come out yet"
    account = came_out + predictions(state["draws"]["front"][0])
    assert state["tokens"] == [came_out.total()]
    times = {
        document: account[1 + STRIDE * document + start]
        for document, start, _ in documents.spans
        if account[1 + STRIDE * document + start]
    }
    drawn = [documents.spans[i] for i, count in times.items() for _ in range(count)]
    assert account == predictions(drawn)
    assert [len(drawn)] == state["draws"]["spans"]


@repeatable
@given(cases())
@example(Case([3, 5], 8, 6, 1, 0, [(1, 12), (2, 5)]))  # each document many times in one group
@example(Case([150], 1, 6, 3, 2, [(7, 60), (3, 1)]))
def test_nothing_is_lost_or_repeated(case: Case) -> None:
    documents = Numbered(case.lengths)
    stream, length = case.stream(documents), case.row_length
    came_out: Counter[int] = Counter()

    def take() -> None:
        for segment in segments(stream.next_row(), length):
            came_out.update(segment)

    for rows, new_length in case.borders:
        for _ in range(rows):
            take()
        stream.set_stage(new_length, [1.0])
        length = new_length
        check_account(came_out, stream.get_state(), documents)
    take()
    while stream.get_state()["taken"]:
        take()
    check_account(came_out, stream.get_state(), documents)


@repeatable
@given(cases(), st.integers(0, 12), st.integers(0, 2))
@example(Case([3, 5], 8, 4, 2, 1, [(3, 12)]), 3, 1)  # just after the border
@example(Case([3, 5], 8, 4, 2, 1, [(3, 12)]), 3, 0)  # just before it
def test_a_restored_stream_goes_on_with_the_same_rows(case: Case, at: int, crossed: int) -> None:
    """Saved after `crossed` borders and at most `at` rows more."""
    crossed = min(crossed, len(case.borders))

    def rows(stream: Stream, count: int) -> list[Row]:
        return [stream.next_row() for _ in range(count)]

    documents = Numbered(case.lengths)
    stream, length = case.stream(documents), case.row_length
    for count, new_length in case.borders[:crossed]:
        rows(stream, count)
        stream.set_stage(new_length, [1.0])
        length = new_length
    left = case.borders[crossed:]
    if left:
        at = min(at, left[0][0])
        left = [(left[0][0] - at, left[0][1]), *left[1:]]
    rows(stream, at)
    state = json.loads(json.dumps(stream.get_state()))
    restored = case.stream(documents, length=length, state=state)
    for count, new_length in left:
        assert_rows_equal(rows(stream, count), rows(restored, count))
        assert stream.get_state() == restored.get_state()
        stream.set_stage(new_length, [1.0])
        restored.set_stage(new_length, [1.0])
    assert_rows_equal(rows(stream, 9), rows(restored, 9))
    assert stream.get_state() == restored.get_state()


def assert_rows_equal(left: list[Row], right: list[Row]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@repeatable
@given(cases(max_borders=1))
def test_without_masks_a_row_is_one_text(case: Case) -> None:
    documents = Numbered(case.lengths)
    masked, unmasked = case.stream(documents), case.stream(documents)
    for rows, length in [(0, case.row_length), *case.borders]:
        for stream in (masked, unmasked):
            for _ in range(rows):
                stream.next_row()
            if length != case.row_length:
                stream.set_stage(length, [1.0])
        a, b = masked.next_row(), unmasked.next_row(mask_documents=False)
        for name in ("tokens", "targets", "loss_weights"):
            np.testing.assert_array_equal(a[name], b[name])
        np.testing.assert_array_equal(b["segment_ids"], a["segment_ids"] > 0)
        np.testing.assert_array_equal(b["positions"], np.arange(length))
        assert (b["segment_ids"].dtype, b["positions"].dtype) == (np.int32, np.int32)


def drawn_order(lengths: list[int], draws: int, **changes: Any) -> list[int]:
    """The first documents of a stream. With one bin, pieces come out as they were drawn."""
    case = Case(lengths, 16, 1, changes.pop("num_streams", 1), changes.pop("index", 0), [])
    order: list[int] = []
    documents = Numbered(lengths)
    stream, last = case.stream(documents, **changes), 0
    while len(order) <= draws:
        for segment in segments(stream.next_row(), 16):
            document, position = divmod(segment[0] - 1, STRIDE)
            if position == 0:
                order.append(document)
            else:
                assert segment[0] == last + 1, "a document's pieces come out of order"
            last = segment[-1]
    return order[:draws]


def test_streams_share_out_one_order_that_is_shuffled_anew_each_epoch() -> None:
    lengths = [5, 1, 40, 16, 15, 17, 3, 8, 100, 2]
    order = drawn_order(lengths, 30)
    epochs = [order[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]
    shares = [drawn_order(lengths, 10, num_streams=3, index=index) for index in range(3)]
    assert [document for draw in zip(*shares, strict=True) for document in draw] == order
    assert drawn_order(lengths, 10, seed=1) != order[:10]


@repeatable
@given(
    st.lists(st.integers(1, 12) | st.integers(1, 150), max_size=12),
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from(PACKINGS),
)
def test_packing_once_brings_every_prediction_once(
    lengths: list[int], length: int, bins: int, packing: str
) -> None:
    documents = Numbered(lengths)
    # Held-out spans may start in the middle of a document.
    spans = [span._replace(start=span.stop // 3) for span in documents.spans]
    rows = list(
        pack_once(
            documents,  # type: ignore
            spans,
            length=length,
            packing=packing,
            bins=bins,
            mask_documents=True,
        )
    )
    parts = [segments(row, length) for row in rows]
    came_out = [token for row in parts for part in row for token in part]
    assert Counter(came_out) == predictions(spans)
    if packing == "concatenate":
        assert came_out == sorted(came_out), "in order"
        assert all(sum(map(len, row)) == length for row in parts[:-1])
    elif packing == "none":
        assert [part for (part,) in parts] == [
            [1 + STRIDE * document + i for i in range(cut, min(cut + length, stop))]
            for document, start, stop in spans
            for cut in range(start, stop, length)
        ]


@repeatable
@given(
    st.lists(st.integers(1, 60), max_size=30),
    st.integers(1, 40),
    st.integers(1, 6),
)
def test_best_fit_makes_the_same_rows_as_grain(lengths: list[int], length: int, bins: int) -> None:
    """Of lengths alone, where Grain's packer takes the tokens."""
    spans = [Span(i, 0, size) for i, size in enumerate(lengths)]
    pieces = [
        {"tokens": np.full(min(length, stop - cut), 1 + document), "cut": np.array(cut)}
        for document, start, stop in spans
        for cut in range(start, stop, length)
    ]
    theirs = grain.experimental.BestFitPackIterDataset(
        grain.MapDataset.source(pieces).to_iter_dataset(),
        length_struct={"tokens": length},
        num_packing_bins=bins,
        shuffle_bins=False,
        meta_features=["cut"],
    )
    draws, ours = Draws([spans], [1.0]), []
    while (group := plan(draws, length, "best_fit", bins))[1]:
        ours += [[group[0][i] for i in row] for row in group[1]]
    for row, wanted in itertools.zip_longest(ours, theirs):
        assert [piece.start for piece in row] == [int(cut) for cut in wanted["cut"]]
        tokens = [1 + piece.document for piece in row for _ in range(piece.start, piece.stop)]
        np.testing.assert_array_equal(wanted["tokens"][: len(tokens)], tokens)
        assert not wanted["tokens"][len(tokens) :].any()


def test_tokens_are_bytes_between_boundaries_and_a_cut_keeps_the_next_token(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_text("abcdefg")
    corpus = open_corpus(DataConfig(source=str(tmp_path / "a.txt")))
    rows = list(
        pack_once(
            corpus, [Span(0, 0, 8)], length=3, packing="best_fit", bins=9, mask_documents=True
        )
    )
    assert [row["tokens"].tolist() for row in rows] == [[BOUNDARY, *b"ab"], [*b"cde"], [*b"fg", 0]]
    assert [row["targets"].tolist() for row in rows] == [
        [*b"abc"],
        [*b"def"],
        [ord("g"), BOUNDARY, 0],
    ]
    assert [row["loss_weights"].tolist() for row in rows] == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("taken", range(9))
def test_pieces_of_a_document_are_joined_again_at_a_border(taken: int) -> None:
    documents = Numbered([79])
    stream = Case([79], 10, 4, 1, 0, []).stream(documents)
    for _ in range(taken):
        stream.next_row()
    stream.set_stage(40, [1.0])
    (front,) = stream.get_state()["draws"]["front"]
    assert all((a[0], a[2]) != (b[0], b[1]) for a, b in zip(front[:-1], front[1:], strict=True))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_document_is_read_once_for_all_its_rows_of_a_group(packing: str) -> None:
    class Counted(Numbered):
        reads = 0

        def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
            self.reads += 1
            return super().tokens(i)

    documents = Counted([799])
    stream = Case([799], 10, 8, 1, 0, [], packing=packing).stream(documents)
    for group in range(1, 4):
        for _ in range(8):
            stream.next_row()
        assert documents.reads == group
