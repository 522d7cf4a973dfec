"""Streams draw of each source in its own epochs, and keep to the weights at any time."""

import json
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.data.corpus import Span
from moe_jax.data.mixture import Draws

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=12)


def _groups(lengths: list[list[int]]) -> list[list[Span]]:
    """A source's documents are numbered from 100 times its own number on."""
    return [
        [Span(100 * source + i, 0, length) for i, length in enumerate(of_source)]
        for source, of_source in enumerate(lengths)
    ]


def _draws(
    groups: list[list[Span]], weights: list[float], index: int, num_streams: int, seed: int = 0
) -> Draws:
    return Draws(groups, weights, index=index, num_streams=num_streams, seed=seed)


def _take(draws: Draws, count: int, limit: int = 10**6) -> list[Span]:
    """Whole spans, unless there is a limit."""
    taken = [draws.take(limit) for _ in range(count)]
    return [span for span in taken if span]


@st.composite
def mixtures(draw: Any) -> tuple[list[list[int]], list[float]]:
    """Lengths of each source's documents, and weights."""
    lengths = draw(
        st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=9), min_size=1, max_size=4)
    )
    parts = draw(
        st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)).filter(any)
    )
    return lengths, [part / sum(parts) for part in parts]


@repeatable
@given(mixtures(), st.integers(1, 4), st.integers(0, 3), st.sampled_from([7, 100]))
@example(([[9], [1] * 9], [0.5, 0.5]), 2, 0, 100)
def test_shares_of_tokens_hold_at_any_time(
    mixture: tuple[list[list[int]], list[float]], num_streams: int, seed: int, limit: int
) -> None:
    lengths, weights = mixture
    longest = min(limit, max(map(max, lengths)))
    for index in range(num_streams):
        draws = _draws(_groups(lengths), weights, index, num_streams, seed)
        drawn = np.zeros(len(lengths))
        apart = max(map(max, lengths))
        for span in _take(draws, 30, limit):
            drawn[span.document // 100] += span.stop - span.start
            # As far as a piece, and what streams start apart, from each of the others.
            behind = np.array(weights) * drawn.sum() - drawn
            assert np.all(np.abs(behind) <= len(lengths) * (longest + apart))
        assert not drawn[np.array(weights) == 0].any()


def test_long_runs_come_to_the_weights() -> None:
    groups = _groups([[100, 3], [7] * 9, [20]])
    tokens = _tokens(_take(_draws(groups, [0.7, 0.2, 0.1], 0, 1), 400), 3)
    np.testing.assert_allclose(tokens / tokens.sum(), [0.7, 0.2, 0.1], atol=3e-2)


@repeatable
@given(mixtures(), st.integers(1, 3))
def test_streams_share_out_each_epoch_of_each_source(
    mixture: tuple[list[list[int]], list[float]], num_streams: int
) -> None:
    """Whatever streams drew of a source, in turn, is one epoch after the other."""
    lengths, weights = mixture
    groups = _groups(lengths)
    drawn: list[list[list[int]]] = []
    for index in range(num_streams):
        draws = _draws(groups, weights, index, num_streams, 1)
        drawn.append([[] for _ in groups])
        for span in _take(draws, 40):
            drawn[-1][span.document // 100].append(span.document)
    for source, spans in enumerate(groups):
        rounds = zip(*(of_stream[source] for of_stream in drawn), strict=False)
        order = [document for draws in rounds for document in draws]
        size = len(spans)
        for epoch in range(len(order) // size):
            assert sorted(order[epoch * size : (epoch + 1) * size]) == [s.document for s in spans]


@repeatable
@given(mixtures(), st.integers(0, 30))
def test_draws_go_on_from_their_state(
    mixture: tuple[list[list[int]], list[float]], count: int
) -> None:
    lengths, weights = mixture
    first, second = (_draws(_groups(lengths), weights, 1, 2, 3) for _ in range(2))
    _take(first, count, 7)
    second.state = json.loads(json.dumps(first.state))
    assert _take(first, 20) == _take(second, 20)
    assert first.state == second.state


@repeatable
@given(mixtures(), st.lists(st.tuples(st.integers(0, 8), st.integers(1, 60)), max_size=3))
def test_what_is_put_back_comes_again(
    mixture: tuple[list[list[int]], list[float]], rounds: list[tuple[int, int]]
) -> None:
    """In order, joined again, whatever was drawn in which pieces; and it counts once."""
    lengths, weights = mixture
    plain, draws = (_draws(_groups(lengths), weights, 0, 1) for _ in range(2))
    for count, limit in rounds:
        before = draws.state
        draws.put_back(_take(draws, count, limit))
        np.testing.assert_allclose(draws.state["behind"], before["behind"], atol=1e-9)
    for source in np.flatnonzero(weights):
        wanted, found = (_of_source(_take(each, 20), source) for each in (plain, draws))
        shorter = min(len(wanted), len(found))
        assert wanted[:shorter] == found[:shorter]


def _of_source(spans: list[Span], source: int) -> list[Span]:
    return [span for span in spans if span.document // 100 == source]


def _tokens(spans: list[Span], sources: int) -> np.ndarray:
    return np.array([sum(s.stop - s.start for s in _of_source(spans, i)) for i in range(sources)])


def test_a_state_is_small_and_reached_at_once() -> None:
    """Wherever a stream stands: nothing is drawn to get there."""
    draws = _draws(_groups([[5, 6], [7]]), [0.5, 0.5], 0, 1)
    far = {"spans": [10**9, 10**9], "front": [[[0, 2, 5]], []], "behind": [0.5, 0.0]}
    draws.state = far
    assert len(json.dumps(far)) < 200
    first, second = _take(draws, 2)
    assert first == (0, 2, 5) and second == (100, 0, 7)


def test_weights_may_change_on_the_way() -> None:
    """What was drawn before is not made up for."""
    draws = _draws(_groups([[5] * 4, [5] * 4]), [1.0, 0.0], 0, 1)
    assert _tokens(_take(draws, 100), 2).tolist() == [500, 0]
    draws.weights = [0.5, 0.5]
    after = _tokens(_take(draws, 100), 2)
    assert abs(after[0] - after[1]) <= 20


def test_streams_do_not_draw_of_the_same_source_at_a_time() -> None:
    groups = _groups([[10] * 20, [10] * 20])
    chosen = np.array(
        [
            [span.document // 100 for span in _take(_draws(groups, [0.9, 0.1], i, 32), 30)]
            for i in range(32)
        ]
    )
    at_a_time = chosen.sum(0)
    assert at_a_time.max() <= 16, "the rare source comes to most streams at once"
