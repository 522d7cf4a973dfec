"""Batches are a function of config and seed alone, however they are shared out and made ahead."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from moe_jax.config import Config, DataConfig, Stage, TrainingConfig
from moe_jax.data.corpus import Span
from moe_jax.data.loader import Batch, eval_batches, train_batches
from moe_jax.data.packing import pack_once

BORDER = 3  # steps of the first stage
BINS = 5  # a border comes in the middle of what the packer fills at a time
WHOLE = (0, 1, 1)
HALVES = [(0, 1, 2), (1, 2, 2)]
QUARTERS = [(i, i + 1, 4) for i in range(4)]

_random = np.random.default_rng(0)
SPANS = [Span(i, 0, int(n)) for i, n in enumerate(_random.integers(2, 91, 40))]


class _Documents:
    """Of tokens at random, not 0, each weighing 1."""

    def __init__(self) -> None:
        self._ids = [_random.integers(1, 257, span.stop + 1, np.int32) for span in SPANS]

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self._ids[i], np.ones(len(self._ids[i]), np.float32)


CORPUS: Any = _Documents()


def _config(**fields: Any) -> Config:
    """24 rows of 16 tokens, after three steps 12 rows of 32."""
    data = {name: fields.pop(name) for name in tuple(fields) if hasattr(DataConfig, name)}
    stages = (Stage(16, BORDER * 384), Stage(32))
    return Config(
        data=DataConfig(**dict(num_streams=4, packing_bins=BINS, prefetch=0, stages=stages) | data),
        training=TrainingConfig(tokens_per_step=384, **fields),
    )


def _batches(
    config: Config, count: int, share: tuple[int, int, int] = WHOLE, state: Any = None
) -> tuple[list[Batch], Any]:
    """`count` batches, and the state after them as JSON gives it back."""
    with contextlib.closing(train_batches(config, CORPUS, [SPANS], share, state)) as iterator:
        batches = list(itertools.islice(iterator, count))
        return batches, json.loads(json.dumps(iterator.get_state()))


def _assert_equal(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def _side_by_side(parts: Sequence[list[Batch]]) -> list[Batch]:
    return [
        {name: np.concatenate([batch[name] for batch in step], axis=1) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


def test_batches_follow_the_curriculum_and_depend_on_the_seed() -> None:
    batches, state = _batches(_config(micro_batches=2), 5)
    assert [batch["tokens"].shape for batch in batches] == [(2, 12, 16)] * 3 + [(2, 6, 32)] * 2
    assert {name: array.dtype.name for name, array in batches[0].items()} == {
        **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), "int32"),
        "loss_weights": "float32",
    }
    assert state["step"] == 5 and sorted(state["streams"]) == ["0", "1", "2", "3"]
    _assert_equal(batches, _batches(_config(micro_batches=2), 5)[0])
    other = dataclasses.replace(_config(micro_batches=2), seed=1)
    assert (batches[0]["tokens"] != _batches(other, 1)[0][0]["tokens"]).any()


@pytest.mark.parametrize("num_streams", [1, 3, 4, 12])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("shares", [HALVES, QUARTERS, [(0, 3, 4), (3, 4, 4)]], ids=str)
def test_processes_together_feed_the_same_batches_as_one(
    num_streams: int, micro_batches: int, shares: list[tuple[int, int, int]]
) -> None:
    config = _config(num_streams=num_streams, micro_batches=micro_batches)
    whole, state = _batches(config, 5)
    parts = [_batches(config, 5, share) for share in shares]
    _assert_equal(_side_by_side([batches for batches, _ in parts]), whole)
    streams: dict[str, Any] = {}
    for _, part in parts:
        for index in streams.keys() & part["streams"].keys():
            assert streams[index] == part["streams"][index]  # two run it, and agree
        streams |= part["streams"]
    assert {"step": 5, "streams": streams} == state
    if num_streams == 4 and shares == HALVES:
        assert [sorted(part["streams"]) for _, part in parts] == [["0", "1"], ["2", "3"]]


@pytest.mark.parametrize("num_streams", [1, 4])
def test_a_step_has_the_same_rows_however_it_is_cut_into_micro_batches(num_streams: int) -> None:
    def rows(config: Config) -> list[list[tuple[int, ...]]]:
        return [
            sorted(
                tuple(np.concatenate([batch[name][i, j] for name in sorted(batch)]).tolist())
                for i, j in np.ndindex(batch["tokens"].shape[:2])
            )
            for batch in _batches(config, 5)[0]
        ]

    one, two = (_config(num_streams=num_streams, micro_batches=count) for count in (1, 2))
    assert rows(one) == rows(two)


@pytest.mark.parametrize("prefetch", [1, 4])
def test_prefetching_changes_neither_batches_nor_states(prefetch: int) -> None:
    for count in range(BORDER + 3):
        expected, state = _batches(_config(), count)
        batches, ahead = _batches(_config(prefetch=prefetch), count)
        _assert_equal(batches, expected)
        assert ahead == state


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("num_streams", [1, 4])
def test_batches_go_on_from_any_state_and_through_the_border(
    prefetch: int, num_streams: int
) -> None:
    config = _config(prefetch=prefetch, num_streams=num_streams)
    whole, last = _batches(config, 7)
    for count in range(BORDER + 3):
        _, state = _batches(config, count)
        rest, end = _batches(config, 7 - count, WHOLE, state)
        _assert_equal(rest, whole[count:])
        assert end == last
        # The state is of all processes; each takes what it needs of it.
        parts = [_batches(config, 7 - count, share, state)[0] for share in HALVES]
        _assert_equal(_side_by_side(parts), whole[count:])


# Every field of a stage that batches follow changes at a border, and a length comes back.
MANY = (
    Stage(16, 2 * 384),
    Stage(16, 3 * 768, tokens_per_step=768, mask_documents=False),
    Stage(32, 3 * 768 + 384, micro_batches=3),
    Stage(16, 3 * 768 + 2 * 384, tokens_per_step=192),
    Stage(48),
)


@pytest.mark.parametrize(
    ("prefetch", "packing"),
    [(0, "best_fit"), (2, "best_fit"), (2, "concatenate"), (0, "none")],
)
def test_batches_go_on_from_inside_every_stage_and_from_its_border(
    prefetch: int, packing: str
) -> None:
    config = _config(stages=MANY, prefetch=prefetch, packing=packing)
    whole, last = _batches(config, 9)
    assert [batch["tokens"].shape for batch in whole] == [
        *(2 * [(1, 24, 16)]),
        *(2 * [(2, 24, 16)]),
        *((3, 4, 32), (1, 12, 16), (1, 12, 16)),
        *(2 * [(1, 8, 48)]),
    ]
    for step, batch in enumerate(whole[:5]):
        in_one = batch["positions"] == np.arange(batch["positions"].shape[-1])
        assert in_one.all() == (step in (2, 3))
    for count in range(1, 9):
        _, state = _batches(config, count)
        rest, end = _batches(config, 9 - count, WHOLE, state)
        _assert_equal(rest, whole[count:])
        assert end == last
        for shares in (HALVES, QUARTERS):
            parts = [_batches(config, 9 - count, share, state)[0] for share in shares]
            _assert_equal(_side_by_side(parts), whole[count:])


def test_rows_without_masks() -> None:
    (batch,), _ = _batches(_config(mask_documents=False), 1)
    assert set(np.unique(batch["segment_ids"])) <= {0, 1}
    np.testing.assert_array_equal(batch["positions"][0, 0], np.arange(16))


HELD_OUT = [span._replace(start=span.stop // 2) for span in SPANS[::2]]


def test_evaluation_covers_the_held_out_spans_once_and_is_always_the_same() -> None:
    config = _config(eval_batches=1000)
    batches = eval_batches(config, CORPUS, HELD_OUT, 16, 7, WHOLE)
    _assert_equal(batches, eval_batches(config, CORPUS, HELD_OUT, 16, 7, WHOLE))
    assert {batch["tokens"].shape for batch in batches} == {(1, 7, 16)}

    packed = list(
        pack_once(CORPUS, HELD_OUT, length=16, packing="best_fit", bins=BINS, mask_documents=True)
    )
    assert len(packed) % 7, "the last batch is not full"
    for name in packed[0]:
        rows = np.concatenate([batch[name][0] for batch in batches])
        np.testing.assert_array_equal(rows[: len(packed)], [row[name] for row in packed])
        assert not rows[len(packed) :].any()
    predictions = sum(batch["loss_weights"].sum() for batch in batches)
    assert predictions == sum(span.stop - span.start for span in HELD_OUT)


@pytest.mark.parametrize("shares", [HALVES, QUARTERS], ids=str)
def test_processes_share_the_rows_of_evaluation(shares: list[tuple[int, int, int]]) -> None:
    config = _config(eval_batches=2)
    whole = eval_batches(config, CORPUS, HELD_OUT, 16, 8, WHOLE)
    assert len(whole) == 2
    parts = [eval_batches(config, CORPUS, HELD_OUT, 16, 8, share) for share in shares]
    _assert_equal(_side_by_side(parts), whole)


def test_nothing_held_out_or_no_batches_wanted() -> None:
    assert eval_batches(_config(), CORPUS, [], 16, 8, WHOLE) == []
    assert eval_batches(_config(eval_batches=0), CORPUS, HELD_OUT, 16, 8, WHOLE) == []
