"""The layer of routed and shared experts, against a dense loop over tokens."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import MeshConfig, ModelConfig, MoEConfig, PrecisionConfig
from moe_jax.layers.moe import MoE, RouterBias, RoutingStats

DIM, BATCH, LENGTH = 8, 4, 6
CONFIG = ModelConfig(
    hidden_size=DIM,
    moe=MoEConfig(
        num_experts=8,
        num_experts_per_tok=3,
        num_shared_experts=2,
        intermediate_size=6,
        num_expert_groups=4,
        num_limited_groups=2,
        buffer_factor=1.0,
    ),
)
WITHOUT_SHARED = dataclasses.replace(
    CONFIG, moe=dataclasses.replace(CONFIG.moe, num_shared_experts=0)
)
F32 = PrecisionConfig(compute_dtype="float32")
VALID = np.ones((BATCH, LENGTH), bool)
VALID[1, 4:] = VALID[3] = False
X = np.random.default_rng(0).normal(size=(BATCH, LENGTH, DIM)).astype(np.float32)
BIAS = np.random.default_rng(1).normal(scale=0.3, size=8).astype(np.float32) - 0.6


# Compiling is most of the time of these tests, so it is kept cheap.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _run(
    sizes: dict[str, int],
    config: ModelConfig = CONFIG,
    precision: PrecisionConfig = F32,
    valid: np.ndarray = VALID,
) -> tuple[np.ndarray, RoutingStats, dict[str, Any]]:
    """Result, statistics and weights of a layer with random weights."""
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[:count])
    with jax.set_mesh(mesh):
        layer = nnx.eval_shape(lambda: MoE(config, precision, rngs=nnx.Rngs(0)))
        graphdef, shapes = nnx.split(layer)
        rng = np.random.default_rng(2)
        state = jax.tree.map(
            lambda shape: jax.device_put(
                rng.normal(scale=0.5, size=shape.shape).astype(np.float32),
                jax.NamedSharding(mesh, shape.sharding.spec),
            ),
            nnx.to_pure_dict(shapes),
        )
        state["router"]["bias"] = jax.device_put(BIAS, jax.NamedSharding(mesh, sharding.P()))
        dtype = jnp.dtype(precision.compute_dtype)
        rows = jax.NamedSharding(mesh, sharding.BATCH)
        x, placed_valid = jax.device_put((X.astype(dtype), valid), rows)
        run = _jit(lambda state, x, valid: nnx.merge(graphdef, state)(x, valid, False))
        y, stats = run(state, x, placed_valid)
        assert y.dtype == dtype
        weights = jax.tree.map(np.asarray, state)
        return np.asarray(y).astype(np.float64), jax.tree.map(np.asarray, stats), weights


def _swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    opened = x @ gate
    return (opened / (1 + np.exp(-opened)) * (x @ up)) @ down


def _by_loops(weights: dict[str, Any], valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Result, load and balance loss in float64, one token at a time."""
    weights = jax.tree.map(lambda w: w.astype(np.float64), weights)
    result, load = np.zeros(X.shape), np.zeros(8, np.int64)
    balance = 0.0
    for b in range(BATCH):
        shares, counts = np.zeros(8), np.zeros(8)
        for t in range(LENGTH):
            x = X[b, t].astype(np.float64)
            if "shared" in weights:
                result[b, t] += _swiglu(
                    x, *(weights["shared"][name]["weight"] for name in ("gate", "up", "down"))
                )
            if not valid[b, t]:
                continue
            scores = 1 / (1 + np.exp(-x @ weights["router"]["weight"]))
            biased = scores + weights["router"]["bias"]
            groups = sorted(range(4), key=lambda g: -(biased[2 * g] + biased[2 * g + 1]))[:2]
            candidates = [2 * g + i for g in groups for i in range(2)]
            chosen = sorted(candidates, key=lambda i: -biased[i])[:3]
            for i in chosen:
                factor = 2.5 * scores[i] / sum(scores[j] for j in chosen)
                result[b, t] += factor * _swiglu(
                    x, weights["gate"][i], weights["up"][i], weights["down"][i]
                )
                load[i] += 1
            shares += scores / scores.sum()
            counts[np.argsort(-scores)[:3]] += 1
        tokens = max(valid[b].sum(), 1)
        balance += float(np.sum(counts * 8 / (3 * tokens) * shares / tokens))
    return result, load, balance


@pytest.mark.parametrize(
    "sizes",
    [{}, {"expert": 4}, {"fsdp": 2, "expert": 2}, {"data": 2, "expert_outer": 2}],
    ids=str,
)
def test_equals_a_dense_loop(sizes: dict[str, int]) -> None:
    y, stats, weights = _run(sizes)
    expected, load, balance = _by_loops(weights, VALID)
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(stats.load_E, load.astype(np.int32))
    chex.assert_trees_all_close(stats.sequence_losses["sequence_loss"], balance, rtol=1e-5)
    assert stats.dropped == 0
    assert stats.rounds > 1  # buffers of one balanced load do not take this routing at once


def test_without_shared_experts_padding_gets_nothing() -> None:
    y, stats, weights = _run({"expert": 2}, WITHOUT_SHARED)
    assert "shared" not in weights
    chex.assert_trees_all_close(y, _by_loops(weights, VALID)[0], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(y[~VALID], np.zeros((8, DIM)))
    assert stats.load_E.sum() == 3 * VALID.sum()


def test_padding_alone() -> None:
    nothing = np.zeros((BATCH, LENGTH), bool)
    y, stats, _ = _run({"expert": 2}, WITHOUT_SHARED, valid=nothing)
    chex.assert_trees_all_equal(y, np.zeros(X.shape))
    chex.assert_trees_all_equal(stats.load_E, np.zeros(8, np.int32))
    assert (stats.sequence_losses["sequence_loss"], stats.dropped, stats.rounds) == (0, 0, 0)


@pytest.mark.parametrize("combine_dtype", ["float32", "bfloat16"])
def test_bfloat16_is_close(combine_dtype: str) -> None:
    """The router gets rounded activations, so a token may choose another expert; few do."""
    precision = PrecisionConfig(compute_dtype="bfloat16", combine_dtype=combine_dtype)
    y, stats, weights = _run({"expert": 2}, precision=precision)
    expected, load, _ = _by_loops(weights, VALID)
    error = np.linalg.norm(y - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(error) < 0.02
    assert np.abs(stats.load_E - load).sum() <= 2
    assert stats.load_E.sum() == load.sum()


def test_the_bias_is_no_parameter() -> None:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        layer = nnx.eval_shape(lambda: MoE(CONFIG, F32, rngs=nnx.Rngs(0)))
    params, biases = nnx.state(layer, nnx.Param), nnx.state(layer, RouterBias)
    assert "bias" not in nnx.to_pure_dict(params)["router"]
    assert [leaf.shape for leaf in jax.tree.leaves(biases)] == [(8,)]
