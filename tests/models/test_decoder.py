"""The decoder: what may influence a logit, and the same numbers on every mesh."""

import dataclasses
import functools
from typing import Any, NamedTuple

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
    ModelConfig,
    MoEConfig,
    PrecisionConfig,
    RopeConfig,
)
from moe_jax.models.decoder import Decoder, RouterBias
from moe_jax.models.language_model import abstract_weights
from moe_jax.ops.cross_entropy import cross_entropy

ROWS, LENGTH, VOCAB, DIM, TOP_K = 8, 8, 24, 16, 2
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=DIM,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=20,
    max_position_embeddings=32,
    attention=AttentionConfig(
        num_heads=2,
        q_lora_rank=10,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
    ),
    rope=RopeConfig(theta=50.0),
    moe=MoEConfig(
        num_experts=8,
        num_experts_per_tok=TOP_K,
        num_shared_experts=1,
        intermediate_size=12,
        num_expert_groups=4,
        num_limited_groups=2,
        buffer_factor=1.0,
    ),
)
# Gradients are taken of stacks of one kind, which halves what is compiled.
ROUTED = dataclasses.replace(CONFIG, num_hidden_layers=2, first_k_dense_replace=0)
DENSE = dataclasses.replace(CONFIG, num_hidden_layers=2, first_k_dense_replace=2)
MESHES = [
    ({"expert": 2}, "none"),
    ({"fsdp": 2, "expert_outer": 2}, "full"),
    ({"data": 2, "fsdp": 2, "expert": 2}, "full"),
    ({"fsdp": 2, "expert_outer": 2, "expert": 2}, "none"),
    ({"expert": 8}, "full"),
]


class Batch(NamedTuple):
    """[rows, length] each."""

    tokens: Any
    segment_ids: Any
    positions: Any


class Setup(NamedTuple):
    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef
    params: Any
    bias: Any

    def place(self, batch: Batch) -> Batch:
        return jax.device_put(batch, jax.NamedSharding(self.mesh, sharding.BATCH))


def _packed(lengths: list[int]) -> tuple[list[int], list[int]]:
    """Segment ids and positions of documents of these lengths, with padding behind them."""
    segments = [i + 1 for i, length in enumerate(lengths) for _ in range(length)]
    positions = [position for length in lengths for position in range(length)]
    padding = [0] * (LENGTH - len(segments))
    return segments + padding, positions + padding


def _batch() -> Batch:
    """Rows of one document, of several, with padding, and of padding alone."""
    documents = [[8], [3, 5], [2, 2, 2], [6], [1, 7], [4, 4], [5, 1], []]
    segments, positions = (
        np.array(part, np.int32) for part in zip(*map(_packed, documents), strict=True)
    )
    tokens = np.random.default_rng(3).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    return Batch(tokens, segments, positions)


def _setup(
    sizes: dict[str, int],
    config: ModelConfig = CONFIG,
    compute_dtype: str = "float32",
    rematerialization: str = "none",
) -> Setup:
    """A decoder with random parameters that do not depend on the mesh."""
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(
            lambda: Decoder(
                config,
                PrecisionConfig(compute_dtype=compute_dtype),
                rematerialization=rematerialization,
                rngs=nnx.Rngs(0),
            )
        )
        graphdef, *shapes = nnx.split(model, nnx.Param, RouterBias)
        rng = np.random.default_rng(0)

        def make(path, shape):
            name, value = jax.tree_util.keystr(path), rng.normal(size=shape.shape)
            if "scale" in name:
                value = 1 + 0.2 * value
            elif "bias" not in name:
                value = 0.25 * value
            else:
                value = 0.2 * value - 0.5
            return jax.device_put(
                value.astype(np.float32), jax.NamedSharding(mesh, shape.sharding.spec)
            )

        shapes = [nnx.to_pure_dict(state) for state in shapes]
        return Setup(mesh, graphdef, *jax.tree_util.tree_map_with_path(make, shapes))


def _loss_and_gradients(setup: Setup, batch: Batch):
    """Mean loss with a large share of the balance loss, statistics, and gradients, as numpy."""

    def loss(params, bias, batch):
        model = nnx.merge(setup.graphdef, params, bias)
        hidden, stats = model.hidden_states(*batch)
        targets = jnp.roll(batch.tokens, -1, axis=1)
        follows = jnp.roll(batch.segment_ids, -1, axis=1) == batch.segment_ids
        weights = (follows & (batch.segment_ids > 0)).astype(jnp.float32)
        total = cross_entropy(model.logits(hidden), targets, weights) / jnp.sum(weights)
        if stats is not None:
            total += 0.1 * jnp.sum(stats.sequence_losses["sequence_loss"]) / ROWS
        return total, stats

    with jax.set_mesh(setup.mesh):
        run = quick_jit(jax.value_and_grad(loss, has_aux=True))
        (value, stats), gradients = run(setup.params, setup.bias, setup.place(batch))
        specs = [
            jax.tree.map(lambda x: x.sharding.spec, tree) for tree in (setup.params, gradients)
        ]
        assert specs[0] == specs[1]
        return jax.tree.map(np.asarray, (value, stats, gradients))


@functools.cache
def _expected(config: ModelConfig):
    """On one device, nothing recomputed."""
    return _loss_and_gradients(_setup({}, config), _batch())


@functools.cache
def _logits_function():
    setup = _setup({})

    @quick_jit
    def run(params, bias, batch):
        model = nnx.merge(setup.graphdef, params, bias)
        return model(batch.tokens, batch.positions, batch.segment_ids)

    return setup, run


def _logits(batch: Batch) -> np.ndarray:
    setup, run = _logits_function()
    with jax.set_mesh(setup.mesh):
        return np.asarray(run(setup.params, setup.bias, setup.place(batch)))


def _one_document(tokens: np.ndarray) -> Batch:
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return Batch(tokens, np.ones((ROWS, LENGTH), np.int32), positions)


def test_a_token_changes_no_earlier_logits() -> None:
    tokens = np.tile(_batch().tokens[:1], (ROWS, 1))
    changed = tokens.copy()
    for t in range(LENGTH):  # row t changes token t
        changed[t, t] = (changed[t, t] + 1) % VOCAB
    before, after = _logits(_one_document(tokens)), _logits(_one_document(changed))
    for t in range(LENGTH):
        chex.assert_trees_all_close(after[t, :t], before[t, :t], rtol=1e-5, atol=1e-5)
        assert np.all(np.max(np.abs(after[t, t:] - before[t, t:]), axis=-1) > 1e-3)


def test_without_segments_and_positions_a_row_is_one_document() -> None:
    batch = _one_document(_batch().tokens)
    setup, _ = _logits_function()
    with jax.set_mesh(setup.mesh):
        run = quick_jit(lambda params, bias, x: nnx.merge(setup.graphdef, params, bias)(x))
        logits = run(setup.params, setup.bias, setup.place(batch).tokens)
    chex.assert_shape(logits, (ROWS, LENGTH, VOCAB))
    chex.assert_type(logits, jnp.float32)
    chex.assert_trees_all_close(np.asarray(logits), _logits(batch), rtol=1e-5, atol=1e-5)


def test_documents_of_a_row_do_not_see_each_other() -> None:
    """Each document of a packed row has the logits that it has alone at the head of a row."""
    rng = np.random.default_rng(4)
    lengths = [3, 1, 2]
    documents = [rng.integers(0, VOCAB, length) for length in lengths]
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    tokens[0, :6] = np.concatenate(documents)
    segments[0], positions[0] = _packed(lengths)
    for row, document in enumerate(documents, start=1):
        tokens[row, : len(document)] = document
        segments[row], positions[row] = _packed([len(document)])
    logits = _logits(Batch(tokens, segments, positions))
    start = 0
    for row, length in enumerate(lengths, start=1):
        packed, alone = logits[0, start : start + length], logits[row, :length]
        chex.assert_trees_all_close(packed, alone, rtol=1e-5, atol=1e-5)
        start += length
    # Both the segments and the positions matter.
    joined = Batch(tokens, np.where(segments > 0, 1, 0).astype(np.int32), positions)
    assert np.max(np.abs(_logits(joined)[0, 3:6] - logits[0, 3:6])) > 1e-3
    stretched = positions.copy()
    stretched[0] *= 2
    moved = _logits(Batch(tokens, segments, stretched))
    assert np.max(np.abs(moved[0, :6] - logits[0, :6])) > 1e-3


def test_padding_has_no_influence() -> None:
    batch = _batch()
    padding = batch.segment_ids == 0
    assert padding.any()
    other = batch._replace(tokens=np.where(padding, (batch.tokens + 5) % VOCAB, batch.tokens))
    before, after = _logits(batch), _logits(other)
    assert np.any(before[padding] != after[padding])
    chex.assert_trees_all_close(after[~padding], before[~padding], rtol=1e-5, atol=1e-5)


def test_load_counts_each_real_choice_once() -> None:
    _, stats, _ = _expected(ROUTED)
    chex.assert_shape([stats.load_E, stats.z, stats.dropped], [(2, 8), (2,), (2,)])
    chex.assert_trees_all_equal(
        stats.load_E.sum(axis=1), np.full(2, TOP_K * np.sum(_batch().segment_ids > 0))
    )
    chex.assert_trees_all_equal(stats.dropped, np.zeros(2, np.int32))
    assert np.any(stats.load_E[0] != stats.load_E[1])  # layers have routers of their own


@pytest.mark.parametrize("config", [ROUTED, DENSE], ids=["routed", "dense"])
def test_every_parameter_of_every_layer_gets_a_gradient(config: ModelConfig) -> None:
    _, stats, gradients = _expected(config)
    blocks = "moe_blocks" if config == ROUTED else "dense_blocks"
    assert set(gradients) == {"embedding", blocks, "norm", "head"}
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        layers = gradient if "blocks" in name else gradient[None]
        for i, layer in enumerate(layers):
            assert np.max(np.abs(layer)) > 1e-6, f"{name}, layer {i}"
    assert (stats is None) == (config == DENSE)
    if stats is not None:
        for name in ("gate", "up", "down"):
            reached = np.max(np.abs(gradients[blocks]["moe"][name]), axis=(2, 3)) > 0
            chex.assert_trees_all_equal(reached, stats.load_E > 0)


def _assert_same(result, expected, *, rounds: bool) -> None:
    value, stats, gradients = result
    expected_value, expected_stats, expected_gradients = expected
    chex.assert_trees_all_close(value, expected_value, rtol=2e-6)
    if expected_stats is not None:
        chex.assert_trees_all_equal(
            (stats.load_E, stats.dropped), (expected_stats.load_E, expected_stats.dropped)
        )
        sums = [(s.sequence_losses, s.share_E, s.z) for s in (stats, expected_stats)]
        chex.assert_trees_all_close(*sums, rtol=2e-5)
    if rounds:
        chex.assert_trees_all_equal(stats.rounds, expected_stats.rounds)
    # The tolerance of an entry is in units of its parameter's largest gradient.
    scale = jax.tree.map(lambda g: np.max(np.abs(g)), expected_gradients)
    chex.assert_trees_all_close(
        jax.tree.map(np.divide, gradients, scale),
        jax.tree.map(np.divide, expected_gradients, scale),
        rtol=2e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize(("sizes", "rematerialization"), MESHES, ids=str)
def test_loss_and_gradients_are_the_same_on_every_mesh(
    sizes: dict[str, int], rematerialization: str
) -> None:
    setup = _setup(sizes, ROUTED, rematerialization=rematerialization)
    _assert_same(_loss_and_gradients(setup, _batch()), _expected(ROUTED), rounds=False)


@pytest.mark.parametrize("rematerialization", ["minimal", "latent", "full"])
def test_recomputation_changes_nothing_and_counts_nothing_twice(rematerialization: str) -> None:
    setup = _setup({}, ROUTED, rematerialization=rematerialization)
    _assert_same(_loss_and_gradients(setup, _batch()), _expected(ROUTED), rounds=True)


def test_dense_layers_split_and_recomputed() -> None:
    setup = _setup({"data": 2, "fsdp": 2}, DENSE, rematerialization="full")
    _assert_same(_loss_and_gradients(setup, _batch()), _expected(DENSE), rounds=False)


def test_bfloat16_is_close() -> None:
    """But for tokens so near a tie that rounding sends them to another expert."""
    setup = _setup({}, compute_dtype="bfloat16")
    batch = _batch()
    with jax.set_mesh(setup.mesh):
        run = quick_jit(lambda params, bias, x: nnx.merge(setup.graphdef, params, bias)(*x))
        inputs = (batch.tokens, batch.positions, batch.segment_ids)
        logits = run(setup.params, setup.bias, setup.place(inputs))
    chex.assert_type(logits, jnp.float32)
    real, expected = batch.segment_ids > 0, _logits(batch)
    error = np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert 1e-4 < np.median(error[real]) < 0.03


def test_parameter_shapes() -> None:
    """By `eval_shape`: nothing is computed."""
    mesh = make_mesh(fsdp=2, expert=2)
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: Decoder(CONFIG, PrecisionConfig(), rngs=nnx.Rngs(0)))
        params, bias = (
            nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, RouterBias)
        )
    chex.assert_type(jax.tree.leaves((params, bias)), jnp.float32)

    def block(layers: int, feed_forward: dict) -> dict:
        attention = {
            "query_down": {"weight": (layers, 16, 10)},
            "query_norm": {"scale": (layers, 10)},
            "query_up": {"weight": (layers, 10, 2, 10)},
            "kv_down": {"weight": (layers, 16, 12)},
            "kv_norm": {"scale": (layers, 8)},
            "kv_up": {"weight": (layers, 8, 2, 11)},
            "output": {"weight": (layers, 2, 5, 16)},
        }
        norms = {name: {"scale": (layers, 16)} for name in ("attention_norm", "mlp_norm")}
        return norms | feed_forward | {"attention": attention}

    def swiglu(layers: int, hidden: int) -> dict:
        return {
            "gate": {"weight": (layers, 16, hidden)},
            "up": {"weight": (layers, 16, hidden)},
            "down": {"weight": (layers, hidden, 16)},
        }

    moe = {
        "router": {"weight": (2, 16, 8)},
        "gate": (2, 8, 16, 12),
        "up": (2, 8, 16, 12),
        "down": (2, 8, 12, 16),
        "shared": swiglu(2, 12),
    }
    expected = {
        "embedding": {"weight": (24, 16)},
        "dense_blocks": block(1, {"mlp": swiglu(1, 20)}),
        "moe_blocks": block(2, {"moe": moe}),
        "norm": {"scale": (16,)},
        "head": {"weight": (16, 24)},
    }
    assert jax.tree.map(lambda leaf: leaf.shape, params) == expected
    biases = jax.tree.map(lambda leaf: leaf.shape, bias)
    assert biases == {"moe_blocks": {"moe": {"router": {"bias": (2, 8)}}}}
    experts = params["moe_blocks"]["moe"]["gate"].sharding.spec
    assert experts == sharding.P(None, sharding.EXPERT_AXES, "fsdp", None)
    dense = params["moe_blocks"]["attention"]["output"]["weight"].sharding.spec
    assert dense == sharding.P(None, sharding.EXPERT_AXES, None, "fsdp")
    # Where each token is a step, dense weights are whole among experts.
    decoding, _ = abstract_weights(CONFIG, mesh, decoding=True)
    assert decoding["moe_blocks"]["moe"]["gate"].sharding.spec == experts
    for shared in (decoding["dense_blocks"], decoding["head"], decoding["moe_blocks"]["attention"]):
        for leaf in jax.tree.leaves(shared):
            assert not set(sharding.EXPERT_AXES) & set(jax.tree.leaves(tuple(leaf.sharding.spec)))
