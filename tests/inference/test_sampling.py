"""What is drawn, on logits of known probabilities."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.inference.sampling import GREEDY, Sampling, candidates, choose

SHARES = np.array([0.05, 0.4, 0.3, 0.15, 0.1])
ROWS = 4000


def _drawn(sampling: Sampling, seed: int = 0) -> np.ndarray:
    logits = jnp.asarray(np.tile(np.log(SHARES), (ROWS, 1)), jnp.float32)
    rows = jnp.arange(ROWS)
    return np.asarray(choose(logits, rows, jnp.zeros_like(rows), jnp.uint32(seed), sampling))


def test_temperature_0_takes_the_best() -> None:
    assert set(_drawn(GREEDY)) == {1}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), SHARES),
        (Sampling(0.5), SHARES**2),
        (Sampling(2.0), SHARES**0.5),
        (Sampling(1.0, top_k=2), SHARES * [0, 1, 1, 0, 0]),
        (Sampling(1.0, top_k=99), SHARES),
        (Sampling(1.0, top_p=0.69), SHARES * [0, 1, 1, 0, 0]),
        (Sampling(1.0, top_p=0.71), SHARES * [0, 1, 1, 1, 0]),
        (Sampling(1.0, top_p=1e-6), SHARES * [0, 1, 0, 0, 0]),
        # Of the three best, the first two have 0.82 of the probability.
        (Sampling(1.0, top_k=3, top_p=0.8), SHARES * [0, 1, 1, 0, 0]),
        # A colder draw needs fewer tokens for the same probability.
        (Sampling(0.5, top_p=0.55), SHARES**2 * [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(sampling: Sampling, expected: np.ndarray) -> None:
    share = np.bincount(_drawn(sampling), minlength=5) / ROWS
    # Four standard deviations; what is left out is never drawn.
    expected = expected / expected.sum()
    assert np.all(np.abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / ROWS))


def test_draws_differ_by_seed_row_and_position() -> None:
    assert np.any(_drawn(Sampling(1.0), seed=0) != _drawn(Sampling(1.0), seed=1))
    logits = jnp.zeros((200, 1000))
    rows, seed = jnp.arange(200), jnp.uint32(0)
    by_row = choose(logits, rows, jnp.zeros_like(rows), seed, Sampling(1.0))
    by_position = choose(logits, jnp.zeros_like(rows), rows, seed, Sampling(1.0))
    for drawn in (by_row, by_position):
        assert len(set(np.asarray(drawn).tolist())) > 150


def test_of_equal_logits_the_first_are_kept() -> None:
    kept = candidates(jnp.zeros((1, 6)), Sampling(1.0, top_k=4))
    assert np.isfinite(kept).tolist() == [[True] * 4 + [False] * 2]


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        (Sampling(-0.1), "temperature=-0.1 must be at least 0; 0 is greedy"),
        (Sampling(float("nan")), "temperature=nan must be at least 0; 0 is greedy"),
        (Sampling(1.0, -1), "top_k=-1 must be at least 0; 0 draws among all tokens"),
        (Sampling(1.0, 0, 0.0), "top_p=0.0 must be above 0 and at most 1"),
        (Sampling(1.0, 0, 1.1), "top_p=1.1 must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_drawn_from(sampling: Sampling, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        sampling.check()
    assert str(error.value) == sentence
