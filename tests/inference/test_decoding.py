"""Sampling, on a stand-in for the model whose next token depends on all tokens before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import AttentionConfig, Config, MeshConfig, ModelConfig
from moe_jax.inference.decoding import sample
from moe_jax.training.step import init_state, make_logits

VOCAB = 7
PROMPT = np.array([3, 1, 4], np.int32)
NUM_TOKENS = 12


def _mesh(**axes: int) -> jax.sharding.Mesh:
    config = MeshConfig(**({"fsdp": 1} | axes))
    return sharding.make_mesh(config, jax.devices()[: int(np.prod(list(axes.values())))])


def _logits(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Row i of the table, where i is the weighted sum of the tokens up to here, modulo 11."""
    sums = jnp.cumsum(tokens * (1 + jnp.arange(tokens.shape[1])), axis=1) % 11
    return table.at[sums].get(out_sharding=jax.P(sharding.BATCH_AXES, None, None))


@pytest.fixture(scope="module")
def table() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((11, VOCAB)), jnp.float32)


def _sample(table: jax.Array, mesh: jax.sharding.Mesh, **changes: float) -> np.ndarray:
    arguments = {"num_tokens": NUM_TOKENS, "seed": 0, "temperature": 1.0} | changes
    with jax.set_mesh(mesh):
        return sample(_logits, jax.device_put(table, jax.P()), PROMPT, mesh=mesh, **arguments)


def _greedy(table: jax.Array) -> list[int]:
    tokens = PROMPT.tolist()
    for _ in range(NUM_TOKENS):
        state = sum((i + 1) * token for i, token in enumerate(tokens)) % 11
        tokens.append(int(np.argmax(table[state])))
    return tokens


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 1}, {"data": 2, "fsdp": 2, "expert_outer": 2}],
    ids=["1", "8"],
)
def test_cold_sampling_is_greedy(table: jax.Array, axes: dict[str, int]) -> None:
    rows = _sample(table, _mesh(**axes), temperature=1e-4)
    assert rows.shape == (np.prod(list(axes.values())), len(PROMPT) + NUM_TOKENS)
    assert rows.dtype == np.int32
    assert rows.tolist() == [_greedy(table)] * len(rows)


def test_draws_differ_by_row_and_by_seed_and_keep_the_prompt(table: jax.Array) -> None:
    mesh = _mesh(fsdp=4)
    rows, again, other = (_sample(table, mesh, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(rows, again)
    assert len({tuple(row) for row in (*rows, *other)}) == 8
    for row in (*rows, *other):
        assert row[: len(PROMPT)].tolist() == PROMPT.tolist()
        assert np.all((row >= 0) & (row < VOCAB))


def test_draws_follow_the_temperature() -> None:
    """Two tokens with odds of 1 to e at temperature 1, of 1 to e^2 at 1/2."""
    table = jnp.full((11, VOCAB), -1e9).at[:, :2].set(jnp.array([0.0, 1.0]))
    for temperature in (1.0, 0.5):
        drawn = _sample(table, _mesh(fsdp=8), num_tokens=200, temperature=temperature)
        share = np.mean(drawn[:, len(PROMPT) :] == 1)
        expected = 1 / (1 + np.exp(-1 / temperature))
        assert share == pytest.approx(expected, abs=0.04)  # 3.7 standard deviations at the most


def test_cold_sampling_of_the_model_itself() -> None:
    """Tokens behind the one that is drawn must not count, whatever stands there."""
    config = Config(
        model=ModelConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            first_k_dense_replace=1,
            intermediate_size=24,
            initializer_range=1.0,
            attention=AttentionConfig(num_heads=2, q_lora_rank=None, kv_lora_rank=8),
        )
    )
    mesh = _mesh(fsdp=2)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config))()
        logits = jax.jit(make_logits(config))
        actual = sample(logits, state, PROMPT, num_tokens=5, mesh=mesh, seed=0, temperature=1e-4)
        tokens = np.zeros((2, len(PROMPT) + 5), np.int32)
        tokens[:, : len(PROMPT)] = PROMPT
        for at in range(len(PROMPT), tokens.shape[1]):
            # The whole length each time, so that one program serves; what is behind is noise.
            tokens[:, at:] = 31
            by_rows = jax.device_put(tokens, jax.NamedSharding(mesh, sharding.BATCH))
            tokens[:, at] = np.argmax(jax.device_get(logits(state, by_rows))[:, at - 1], axis=-1)
    np.testing.assert_array_equal(actual, tokens)
    assert len(set(actual[0, len(PROMPT) :].tolist())) > 1  # it does not repeat one token
