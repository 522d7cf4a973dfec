"""The layer of routed and shared experts, against a dense loop over tokens."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, place, quick_jit
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from moe_jax import sharding
from moe_jax.config import BackendConfig, ModelConfig, MoEConfig, PrecisionConfig
from moe_jax.layers.moe import MoE, RouterBias, RoutingStats
from moe_jax.models.block import REMATERIALIZATION
from moe_jax.ops.dispatch import Balanced

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


def _with(**changes: Any) -> ModelConfig:
    return dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, **changes))


WITHOUT_SHARED = _with(num_shared_experts=0)
PLAIN: dict[str, Any] = dict(
    scoring_func="softmax",
    topk_method="greedy",
    num_expert_groups=1,
    num_limited_groups=1,
    num_shared_experts=0,
    routed_scaling_factor=1.0,
    sequence_loss_weight=0.0,
)
FAMILIES = {
    "v3": CONFIG,
    "v2": _with(
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=4.0,
        sequence_loss_weight=0.0,
        expert_loss_weight=1.0,
        device_loss_weight=1.0,
        communication_loss_weight=1.0,
        num_device_groups=4,
        token_dropping="device",
        capacity_factor=0.7,
        capacity_group=2,
        undropped_sequences=0.3,
    ),
    # Scores that decide who is dropped are those of the experts that the bias has steered to.
    "v3 that drops": _with(token_dropping="device", capacity_factor=0.6, num_device_groups=2),
    "mixtral": _with(**PLAIN, num_experts_per_tok=2),
    "switch": _with(
        **PLAIN,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        token_dropping="expert",
        capacity_factor=0.9,
        capacity_group=None,
    ),
}
F32 = PrecisionConfig(compute_dtype="float32")
VALID = np.ones((BATCH, LENGTH), bool)
VALID[1, 4:] = VALID[3] = False
X = np.random.default_rng(0).normal(size=(BATCH, LENGTH, DIM)).astype(np.float32)
BIAS = np.random.default_rng(1).normal(scale=0.3, size=8).astype(np.float32) - 0.6


def _run(
    sizes: dict[str, int],
    config: ModelConfig = CONFIG,
    precision: PrecisionConfig = F32,
    valid: np.ndarray = VALID,
    training: bool = False,
) -> tuple[np.ndarray, RoutingStats, dict[str, Any]]:
    """Result, statistics and weights of a layer with random weights."""
    graphdef, mesh, state = _layer(sizes, config, precision)
    with jax.set_mesh(mesh):
        dtype = jnp.dtype(precision.compute_dtype)
        rows = jax.NamedSharding(mesh, sharding.BATCH)
        x, placed_valid = jax.device_put((X.astype(dtype), valid), rows)
        run = quick_jit(lambda state, x, valid: nnx.merge(graphdef, state)(x, valid, training))
        y, stats = run(state, x, placed_valid)
        assert y.dtype == dtype
        weights = jax.tree.map(np.asarray, state)
        return np.asarray(y).astype(np.float64), jax.tree.map(np.asarray, stats), weights


def _layer(
    sizes: dict[str, int], config: ModelConfig, precision: PrecisionConfig = F32
) -> tuple[nnx.GraphDef, jax.sharding.Mesh, dict[str, Any]]:
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        layer = nnx.eval_shape(lambda: MoE(config, precision, rngs=nnx.Rngs(0)))
        graphdef, shapes = nnx.split(layer)
        rng = np.random.default_rng(2)
        state = place(
            mesh, nnx.to_pure_dict(shapes), lambda shape: rng.normal(scale=0.5, size=shape)
        )
        if config.moe.topk_method == "noaux_tc":
            state["router"]["bias"] = jax.device_put(BIAS, jax.NamedSharding(mesh, sharding.P()))
        return graphdef, mesh, state


def _swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    opened = x @ gate
    return (opened / (1 + np.exp(-opened)) * (x @ up)) @ down


class Expected(NamedTuple):
    """In float64: the layer's result and what it reports; `kept` is by (row, place, expert)."""

    y: np.ndarray
    load: np.ndarray
    share: np.ndarray
    z: float
    losses: dict[str, float]
    kept: dict[tuple[int, int, int], bool]


def _scores(x: np.ndarray, router: np.ndarray, config: MoEConfig) -> tuple[np.ndarray, float]:
    """Of one token: its scores, and the squared log-partition of its logits."""
    logits = x @ router
    exponentials = np.exp(logits)
    z = np.log(exponentials.sum()) ** 2
    if config.scoring_func == "softmax":
        return exponentials / exponentials.sum(), z
    return 1 / (1 + np.exp(-logits)), z


def _chosen(scores: np.ndarray, bias: np.ndarray, config: MoEConfig) -> list[int]:
    groups, size = config.num_expert_groups, 8 // config.num_expert_groups
    steered = scores + bias
    best = 2 if config.topk_method == "noaux_tc" else 1
    of_group = [np.sort(steered[g * size : (g + 1) * size])[-best:].sum() for g in range(groups)]
    winners = np.argsort(of_group)[::-1][: config.num_limited_groups]
    candidates = [i for g in winners for i in range(g * size, (g + 1) * size)]
    return sorted(candidates, key=lambda i: -steered[i])[: config.num_experts_per_tok]


def _kept(
    chosen: dict[tuple[int, int], list[int]],
    scores: dict[tuple[int, int], np.ndarray],
    config: MoEConfig,
) -> dict[tuple[int, int, int], bool]:
    """Each choice in the order in which its group of rows is served, and who is still served."""
    choices = [(b, t, k, i) for (b, t), ids in chosen.items() for k, i in enumerate(ids)]
    if config.token_dropping == "none":
        return {(b, t, i): True for b, t, _, i in choices}
    per_device = config.token_dropping == "device"
    buckets = config.num_device_groups if per_device else 8
    rows = config.capacity_group or BATCH
    capacity = config.capacity_factor * rows * LENGTH * config.num_experts_per_tok / buckets
    share = config.undropped_sequences if per_device else 0.0
    exempt = {b for b in range(BATCH) if math.floor(b * share) > math.floor((b - 1) * share)}
    if per_device:
        choices.sort(key=lambda c: (c[0] not in exempt, -scores[c[:2]][c[3]]))
    else:
        choices.sort(key=lambda c: (c[2], c[0], c[1]))
    served: dict[tuple[int, int], int] = {}
    kept = {}
    for b, t, _, i in choices:
        bucket = (b // rows, i * buckets // 8)
        kept[b, t, i] = b in exempt or served.get(bucket, 0) < math.ceil(capacity)
        served[bucket] = served.get(bucket, 0) + 1
    return kept


def _losses(tokens: list[tuple[list[int], np.ndarray]], config: MoEConfig) -> dict[str, float]:
    """Of one sequence: V3, equations 17 to 20; V2, section 2.2.3."""
    top_k, count = config.num_experts_per_tok, max(len(tokens), 1)
    f, best, p = np.zeros(8), np.zeros(8), np.zeros(8)
    sent = np.zeros(config.num_device_groups)
    for ids, scores in tokens:
        f[ids] += 8 / (top_k * count)
        best[np.argsort(-scores)[:top_k]] += 8 / (top_k * count)
        p += scores / scores.sum() / count
        devices = sorted({i * config.num_device_groups // 8 for i in ids})
        sent[devices] += config.num_device_groups / (config.num_limited_groups * count)
    of_devices = [x.reshape(config.num_device_groups, -1) for x in (f, p)]
    losses = {
        "sequence_loss": best @ p,
        "expert_loss": f @ p,
        "device_loss": of_devices[0].mean(axis=1) @ of_devices[1].sum(axis=1),
        "communication_loss": sent @ of_devices[1].sum(axis=1),
    }
    return {name: float(x) for name, x in losses.items() if getattr(config, f"{name}_weight")}


def _by_loops(
    weights: dict[str, Any],
    valid: np.ndarray = VALID,
    config: MoEConfig = CONFIG.moe,
    training: bool = False,
) -> Expected:
    """One token at a time."""
    weights = jax.tree.map(lambda w: w.astype(np.float64), weights)
    x, router = X.astype(np.float64), weights["router"]["weight"]
    bias = weights["router"].get("bias", np.zeros(8))
    y, load, share, z = np.zeros(X.shape), np.zeros(8, np.int32), np.zeros(8), 0.0
    tokens = [(b, t) for b in range(BATCH) for t in range(LENGTH) if valid[b, t]]
    scored = {at: _scores(x[at], router, config) for at in tokens}
    scores = {at: score for at, (score, _) in scored.items()}
    chosen = {at: _chosen(scores[at], bias, config) for at in tokens}
    kept = _kept(chosen, scores, config if training else MoEConfig())
    for at in tokens:
        factors = config.routed_scaling_factor * scores[at]
        if config.norm_topk_prob:
            factors = factors / scores[at][chosen[at]].sum()
        for i in chosen[at]:
            load[i] += 1
            if kept[*at, i]:
                expert = (weights[name][i] for name in ("gate", "up", "down"))
                y[at] += factors[i] * _swiglu(x[at], *expert)
        share += scores[at] / scores[at].sum()
        z += scored[at][1]
    if "shared" in weights:
        y += _swiglu(x, *(weights["shared"][name]["weight"] for name in ("gate", "up", "down")))
    by_row = [
        _losses([(chosen[at], scores[at]) for at in tokens if at[0] == b], config)
        for b in range(BATCH)
    ]
    losses = {name: sum(row[name] for row in by_row) for name in by_row[0]}
    return Expected(y, load, share, z, losses, kept)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"expert": 4}, {"fsdp": 2, "expert": 2}, {"data": 2, "expert_outer": 2}],
    ids=str,
)
def test_equals_a_dense_loop(sizes: dict[str, int]) -> None:
    stats = _check_family("v3", sizes, training=False)
    if sizes == {"expert": 4}:  # one device of four does not take this routing at once
        assert stats.rounds > 1


def _check_family(name: str, sizes: dict[str, int], training: bool) -> RoutingStats:
    config = FAMILIES[name]
    y, stats, weights = _run(sizes, config, training=training)
    expected = _by_loops(weights, VALID, config.moe, training)
    chex.assert_trees_all_close(y, expected.y, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(stats.load_E, expected.load)
    assert stats.dropped == sum(not kept for kept in expected.kept.values())
    found = (stats.share_E, stats.z, stats.sequence_losses)
    chex.assert_trees_all_close(found, (expected.share, expected.z, expected.losses), rtol=1e-5)
    return stats


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "expert": 2}], ids=str)
@pytest.mark.parametrize("name", ["v2", "v3 that drops", "mixtral", "switch"])
def test_every_family_equals_a_dense_loop(name: str, sizes: dict[str, int]) -> None:
    """Rows of several devices share a capacity; load and losses count what is chosen."""
    stats = _check_family(name, sizes, training=True)
    assert (stats.dropped > 2) == (name != "mixtral")
    assert stats.load_E.sum() == FAMILIES[name].moe.num_experts_per_tok * VALID.sum()


@pytest.mark.parametrize("name", ["v2", "switch"])
def test_nothing_is_dropped_outside_training(name: str) -> None:
    assert _check_family(name, {"expert": 2}, training=False).dropped == 0


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "expert": 2}], ids=str)
def test_a_dropped_token_passes_by_and_teaches_nothing(sizes: dict[str, int]) -> None:
    """Where its only choice is dropped, a token gets 0 and gives no gradient."""
    config = FAMILIES["switch"]
    graphdef, mesh, state = _layer(sizes, config)
    expected = _by_loops(jax.tree.map(np.asarray, state), VALID, config.moe, training=True)
    dropped = np.zeros((BATCH, LENGTH), bool)
    for (b, t, _), kept in expected.kept.items():
        dropped[b, t] = not kept
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, sharding.BATCH)
        x, valid = jax.device_put((X, VALID), rows)

        @quick_jit
        @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
        def run(state, x):
            y, _ = nnx.merge(graphdef, state)(x, valid, True)
            return jnp.sum(y**2), y

        (gradients, of_x), y = jax.device_get(run(state, x))
    served = VALID & ~dropped
    assert dropped.sum() > 2
    for each in (y, of_x):
        chex.assert_trees_all_equal(np.any(each != 0, axis=-1), served)
    # An expert whose tokens were all served, or some of them, learns; the router from these alone.
    chosen = np.zeros(8, bool)
    chosen[[i for (_, _, i), kept in expected.kept.items() if kept]] = True
    for name in ("gate", "up", "down"):
        chex.assert_trees_all_equal(np.any(gradients[name] != 0, axis=(1, 2)), chosen)
    assert np.any(gradients["router"]["weight"] != 0)


def test_without_shared_experts_padding_gets_nothing() -> None:
    y, stats, weights = _run({"expert": 2}, WITHOUT_SHARED)
    assert "shared" not in weights
    chex.assert_trees_all_close(y, _by_loops(weights).y, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(y[~VALID], np.zeros((8, DIM)))
    assert stats.load_E.sum() == 3 * VALID.sum()


def test_padding_alone() -> None:
    nothing = np.zeros((BATCH, LENGTH), bool)
    y, stats, _ = _run({"expert": 2}, WITHOUT_SHARED, valid=nothing)
    chex.assert_trees_all_equal(y, np.zeros(X.shape))
    chex.assert_trees_all_equal(stats.load_E, np.zeros(8, np.int32))
    assert (stats.sequence_losses["sequence_loss"], stats.dropped, stats.rounds) == (0, 0, 1)


@pytest.mark.parametrize("combine_dtype", ["float32", "bfloat16"])
def test_bfloat16_is_close(combine_dtype: str) -> None:
    """The router gets rounded activations, so a token may choose another expert; few do."""
    precision = PrecisionConfig(compute_dtype="bfloat16", combine_dtype=combine_dtype)
    y, stats, weights = _run({"expert": 2}, precision=precision)
    expected = _by_loops(weights)
    error = np.linalg.norm(y - expected.y, axis=-1) / np.linalg.norm(expected.y, axis=-1)
    assert np.median(error) < 0.02
    assert np.abs(stats.load_E - expected.load).sum() <= 2
    assert stats.load_E.sum() == expected.load.sum()


def test_the_bias_is_no_parameter() -> None:
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        layer = nnx.eval_shape(lambda: MoE(CONFIG, F32, rngs=nnx.Rngs(0)))
    params, biases = nnx.state(layer, nnx.Param), nnx.state(layer, RouterBias)
    assert "bias" not in nnx.to_pure_dict(params)["router"]
    assert [leaf.shape for leaf in jax.tree.leaves(biases)] == [(8,)]


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
@pytest.mark.parametrize(("policy", "kept"), [("minimal", 1), ("latent", 0)])
def test_what_has_come_by_exchange_is_kept_by_policy(
    exchange: str, policy: str, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under `minimal`, tokens do not travel again in the backward pass."""
    config = dataclasses.replace(CONFIG, backends=BackendConfig(exchange=exchange))
    graphdef, mesh, state = _layer({"expert": 4}, config)
    tokens, moe = LENGTH, config.moe
    groups = moe.num_expert_groups, moe.num_limited_groups
    balanced = Balanced(tokens, moe.num_experts_per_tok, 8, moe.buffer_factor, *groups)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, sharding.BATCH)
        x, valid = jax.device_put((X, VALID), rows)

        @functools.partial(jax.checkpoint, policy=REMATERIALIZATION[policy])
        def layer(state, x):
            return nnx.merge(graphdef, state)(x, valid, True)[0]

        print_saved_residuals(layer, state, x)
    received = f"f32[{4 * 4 * balanced.rows(moe.num_experts // 4)}@"
    lines = capsys.readouterr().out.replace("float32", "f32").splitlines()
    assert sum(line.startswith(received) and f",{DIM}]" in line for line in lines) == kept
