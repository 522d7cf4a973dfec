"""Multi-token prediction, against its equations on each document alone."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, quick_jit
from flax import nnx

from moe_jax import sharding
from moe_jax.config import (
    AttentionConfig,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    PrecisionConfig,
    TrainingConfig,
)
from moe_jax.models.block import make_context
from moe_jax.models.language_model import LanguageModel, abstract_weights
from moe_jax.models.multi_token_prediction import reaches, shifted
from moe_jax.schedules import scheduled
from moe_jax.training.step import first_state, make_train_step

ROWS, LENGTH, VOCAB, DIM, DEPTH = 4, 8, 24, 12, 2
MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=DIM,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    intermediate_size=10,
    max_position_embeddings=32,
    num_nextn_predict_layers=DEPTH,
    attention=AttentionConfig(kind="grouped_query", num_heads=2, num_key_value_heads=1, head_dim=4),
    moe=MoEConfig(
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=0,
        intermediate_size=6,
        num_expert_groups=1,
        num_limited_groups=1,
    ),
)
# Documents of a row, and padding behind them.
DOCUMENTS = [[8], [3, 5], [2, 1, 4], [6]]


def _model(sizes: dict[str, int] | None = None) -> LanguageModel:
    mesh = make_mesh(**(sizes or {}))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda x: jax.device_put(rng.normal(scale=0.4, size=x.shape).astype(x.dtype), x.sharding),
        abstract_weights(MODEL, mesh),
    )
    return LanguageModel(MODEL, PrecisionConfig(compute_dtype="float32"), mesh, *weights)


def _batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, lengths in enumerate(DOCUMENTS):
        at = 0
        for number, length in enumerate(lengths, start=1):
            segments[row, at : at + length] = number
            positions[row, at : at + length] = np.arange(length)
            at += length
    weights = reaches(jnp.asarray(segments), 1).astype(np.float32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segments,
        "positions": positions,
        "loss_weights": np.asarray(weights),
    }


def _ahead(model: LanguageModel, batch: dict[str, np.ndarray]) -> Any:
    """Logits of all depths, [depth, rows, length, vocab], and what the routers report."""

    def run(parameters, router_bias, *inputs):
        decoder = nnx.merge(model.graphdef, parameters, router_bias)
        hidden, _ = decoder.hidden_states(*inputs)
        ahead = decoder.predict_ahead(hidden, *inputs)
        return decoder.logits(ahead.hidden_KBLD), ahead.stats

    inputs = [model.place(batch[name]) for name in ("tokens", "segment_ids", "positions")]
    with jax.set_mesh(model.mesh):
        return jax.device_get(quick_jit(run)(model.parameters, model.router_bias, *inputs))


def test_shifted_and_reaches() -> None:
    x = jnp.array([[1, 1, 1, 2, 2, 0]])
    chex.assert_trees_all_equal(shifted(x, 2), jnp.array([[1, 2, 2, 0, 0, 0]]))
    expected = jnp.array([[True, False, False, False, False, False]])
    chex.assert_trees_all_equal(reaches(x, 2), expected)


def test_a_row_of_two_tokens_keeps_its_split() -> None:
    """What is left of it after a shift is one token in one row."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        row = jax.device_put(np.array([[5, 6]]), jax.NamedSharding(mesh, sharding.BATCH))
        moved = shifted(row, 1)
        assert moved.sharding.spec[0] == row.sharding.spec[0]
        chex.assert_trees_all_equal(moved, jnp.array([[6, 0]]))


def test_equals_the_modules_one_after_the_other_on_each_document() -> None:
    """Equations 21 to 23: [embedding of t + k; state of depth k - 1] -> layer -> head."""
    model, batch = _model(), _batch()
    logits, _ = _ahead(model, batch)
    with jax.set_mesh(model.mesh):
        decoder = nnx.merge(model.graphdef, model.parameters, model.router_bias)
        graphdef, stacked = nnx.split(decoder.mtp)

        @quick_jit
        def chain(row):
            """One document, twice [2, length]; the logits that have the tokens they need."""
            length = row.shape[1]
            ones, positions = jnp.ones_like(row), jnp.zeros_like(row) + jnp.arange(length)
            hidden, _ = decoder.hidden_states(row, ones, positions)
            found = []
            for k in range(1, DEPTH + 1):
                module = nnx.merge(graphdef, jax.tree.map(lambda v, k=k: v[k - 1], stacked))
                left = length - k
                if left < 1:
                    break
                both = [
                    module.embedding_norm(decoder.embedding(row[:, k:])),
                    module.hidden_norm(hidden[:, :left]),
                ]
                x = module.projection(jnp.concatenate(both, axis=-1))
                context = make_context(ones[:, :left], positions[:, :left], MODEL, False)
                x, _ = module.block(x, context)
                hidden = module.norm(x)
                found.append(decoder.logits(hidden)[0])
            return found

        for row, lengths in enumerate(DOCUMENTS):
            at = 0
            for length in lengths:
                document = batch["tokens"][[row, row], at : at + length]
                for k, expected in enumerate(chain(model.place(document)), start=1):
                    found = logits[k - 1, row, at : at + length - k]
                    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
                at += length


def test_what_has_no_token_to_see_is_routed_nowhere() -> None:
    _, stats = _ahead(_model(), _batch())
    for k in (1, 2):
        tokens = sum(max(length - k, 0) for row in DOCUMENTS for length in row)
        assert stats.load_E[k - 1].sum() == 2 * tokens
    chex.assert_trees_all_equal(stats.dropped, np.zeros(DEPTH, np.int32))


def test_the_same_on_a_mesh() -> None:
    logits, stats = _ahead(_model(), _batch())
    split, split_stats = _ahead(_model({"fsdp": 2, "expert": 2}), _batch())
    chex.assert_trees_all_close(split, logits, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(split_stats.load_E, stats.load_E)


CONFIG = Config(
    model=MODEL,
    precision=PrecisionConfig(compute_dtype="float32"),
    training=TrainingConfig(mtp_loss_weight=0.5, rematerialization="none"),
)


@functools.cache
def _step() -> tuple[Any, Any, Any]:
    """The state before, the state after a step, and the metrics."""
    model = _model()
    with jax.set_mesh(model.mesh):
        state = first_state(CONFIG, model.parameters, model.router_bias)
        batch = {name: jnp.asarray(value)[None] for name, value in _batch().items()}
        batch = jax.device_put(batch, sharding.batch_sharding(model.mesh))
        step = quick_jit(make_train_step(CONFIG))
        return jax.device_get((state, *step(state, batch, scheduled(CONFIG, 0))))


def test_the_loss_is_the_mean_over_depths_per_token_of_the_batch() -> None:
    """Equations 24 and 25: the denominator is that of the main loss."""
    batch, (_, _, metrics) = _batch(), _step()
    logits, _ = _ahead(_model(), batch)
    total = 0.0
    for k in (1, 2):
        log_probs = jax.nn.log_softmax(logits[k - 1], axis=-1)
        for row, lengths in enumerate(DOCUMENTS):
            at = 0
            for length in lengths:
                for t in range(at, at + length - k - 1):
                    total -= log_probs[row, t, batch["tokens"][row, t + k + 1]]
                at += length
    expected = total / DEPTH / batch["loss_weights"].sum()
    assert metrics["mtp_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_every_parameter_moves_and_each_bias_by_its_own_load() -> None:
    before, after, _ = _step()
    for path, mu in jax.tree_util.tree_leaves_with_path(after["optimizer"]["mu"]):
        name = jax.tree_util.keystr(path)
        for layer in mu if "blocks" in name or "mtp" in name else mu[None]:
            assert np.max(np.abs(layer)) > 0, name
    _, stats = _ahead(_model(), _batch())
    mean = stats.load_E.mean(axis=1, keepdims=True)
    moved = jax.tree.map(np.subtract, after["router_bias"], before["router_bias"])
    (of_modules,) = jax.tree.leaves(moved["mtp"])
    chex.assert_trees_all_close(of_modules, 0.001 * np.sign(mean - stats.load_E), atol=1e-6)
