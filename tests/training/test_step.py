"""One step: the same however the batch is cut and spread, and harmless where it goes wrong."""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import (
    AttentionConfig,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PrecisionConfig,
    RopeConfig,
    TrainingConfig,
)
from moe_jax.training.optimizer import learning_rate
from moe_jax.training.step import graph, init_state, make_eval_step, make_train_step

ROWS, LENGTH, VOCAB, EXPERTS, TOP_K, LAYERS = 8, 16, 32, 8, 2, 2
CONFIG = Config(
    model=ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=0,
        max_position_embeddings=LENGTH,
        attention=AttentionConfig(
            num_heads=2,
            q_lora_rank=None,
            kv_lora_rank=8,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=4,
        ),
        moe=MoEConfig(
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            num_shared_experts=0,
            intermediate_size=8,
            bias_update_speed=0.25,
            sequence_loss_weight=0.1,
        ),
    ),
    precision=PrecisionConfig(compute_dtype="float32"),
    # A large eps: otherwise Adam's first update is the gradient's sign, rounding errors included.
    optimizer=OptimizerConfig(peak_lr=0.1, warmup_steps=4, eps=0.1, ema_decay=0.75),
    training=TrainingConfig(num_steps=20, micro_batches=1, rematerialization="none"),
)
FROZEN = ("parameters", "optimizer", "router_bias", "ema", "update")


def _batch(micro_batches: int = 1) -> dict[str, np.ndarray]:
    """The same rows each time, row r in micro-batch r % micro_batches, as the loader cuts them.

    Rows hold two documents and padding of very different sizes; row 3 holds nothing.
    """
    rng = np.random.default_rng(0)
    valid = np.arange(LENGTH) < np.array([16, 3, 9, 0, 12, 1, 16, 5])[:, None]
    segments = np.where(np.arange(LENGTH) < 2, 1, 2) * valid
    rows = {
        "tokens": rng.integers(VOCAB, size=valid.shape) * valid,
        "targets": rng.integers(VOCAB, size=valid.shape) * valid,
        "segment_ids": segments,
        "positions": (np.arange(LENGTH) - 2 * (segments == 2)) * valid,
    }
    # Not always 1, so that a mean over tokens is not a mean over weights.
    weights = valid * rng.choice([0.0, 0.5, 1.0], size=valid.shape, p=[0.2, 0.2, 0.6])
    batch = {name: array.astype(np.int32) for name, array in rows.items()}
    batch["loss_weights"] = weights.astype(np.float32)
    return {
        name: array.reshape(-1, micro_batches, LENGTH).swapaxes(0, 1)
        for name, array in batch.items()
    }


@functools.cache
def _mesh(axes: tuple[tuple[str, int], ...]) -> jax.sharding.Mesh:
    sizes = {"fsdp": 1} | dict(axes)
    return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


@functools.cache
def _shapes(config: Config = CONFIG) -> Any:
    with jax.set_mesh(_mesh(())):
        return jax.eval_shape(lambda: init_state(config))


def _state(config: Config = CONFIG) -> Any:
    """As after some updates: every array holds something, the norms near 1, `nu` above 0."""
    rng = np.random.default_rng(1)

    def value(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [key.key for key in path]
        if names[0] in ("step", "update"):
            return np.array({"step": 7, "update": 5}[names[0]], np.int32)
        array = 0.3 * rng.standard_normal(shape.shape, np.float32)
        if "nu" in names:
            array = 0.1 * array**2
        if "scale" in names and names[0] == "parameters":
            array += 1.0
        return array

    return jax.tree_util.tree_map_with_path(value, _shapes(config))


@functools.cache
def _layout(axes: tuple[tuple[str, int], ...], config: Config = CONFIG) -> Any:
    """The sharding of each array of the state."""
    with jax.set_mesh(_mesh(axes)):
        return jax.tree.map(
            # Scalars have no sharding here.
            lambda x: jax.NamedSharding(_mesh(axes), x.sharding.spec if x.sharding else jax.P()),
            jax.eval_shape(lambda: init_state(config)),
        )


@functools.cache
def _step(
    axes: tuple[tuple[str, int], ...],
    micro_batches: int,
    rematerialization: str,
    config: Config = CONFIG,
) -> Any:
    training = dataclasses.replace(
        config.training, micro_batches=micro_batches, rematerialization=rematerialization
    )
    with jax.set_mesh(_mesh(axes)):
        return jax.jit(
            make_train_step(dataclasses.replace(config, training=training)),
            # Compiling is what takes the time here.
            compiler_options={"xla_backend_optimization_level": 0},
        )


def _run(
    state: Any,
    batch: dict[str, np.ndarray],
    rematerialization: str = "none",
    config: Config = CONFIG,
    **axes: int,
) -> tuple[Any, dict[str, Any]]:
    """The state after the step and the metrics, both on the host."""
    new, metrics = _run_on_devices(state, batch, rematerialization, config, **axes)[1:]
    return jax.device_get(new), {name: value.item() for name, value in metrics.items()}


def _run_on_devices(
    state: Any,
    batch: dict[str, np.ndarray],
    rematerialization: str = "none",
    config: Config = CONFIG,
    **axes: int,
) -> tuple[Any, Any, Any]:
    key = tuple(sorted(axes.items()))
    step = _step(key, len(batch["tokens"]), rematerialization, config)
    with jax.set_mesh(_mesh(key)):
        before = jax.device_put(state, _layout(key, config))
        return before, *step(before, jax.device_put(batch, sharding.batch_sharding(_mesh(key))))


@functools.cache
def _reference() -> tuple[Any, dict[str, Any]]:
    """One device, one micro-batch."""
    return _run(_state(), _batch())


def _assert_close(actual: Any, expected: Any) -> None:
    """Equal but for the order of float32 sums."""

    def close(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        name = jax.tree_util.keystr(path)
        scale = float(np.max(np.abs(b), initial=1e-6))
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * scale, err_msg=name)

    jax.tree_util.tree_map_with_path(close, actual, expected)


@pytest.mark.parametrize(
    ("micro_batches", "rematerialization", "axes"),
    [
        (4, "full", {}),
        (2, "none", {"fsdp": 2}),
        (2, "none", {"data": 2, "expert": 2}),
        (1, "full", {"fsdp": 2, "expert_outer": 2, "expert": 2}),
    ],
    ids=["4-micro-batches", "2-devices", "4-devices", "8-devices"],
)
def test_however_it_is_cut_and_spread_the_update_is_the_same(
    micro_batches: int, rematerialization: str, axes: dict[str, int]
) -> None:
    state, metrics = _run(_state(), _batch(micro_batches), rematerialization, **axes)
    expected_state, expected_metrics = _reference()
    _assert_close(state, expected_state)
    for name, value in expected_metrics.items():
        if name != "dispatch_rounds":  # buffers follow the tokens of a device
            assert metrics[name] == pytest.approx(value, rel=1e-5), name


def _family(moe: dict[str, Any], **model: Any) -> Config:
    changed = dataclasses.replace(CONFIG.model.moe, **{"sequence_loss_weight": 0.0, **moe})
    model = {"moe": changed, **model}
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **model))


GROUPED = AttentionConfig(kind="grouped_query", num_heads=4, num_key_value_heads=2, head_dim=4)
LLAMA: dict[str, Any] = dict(
    attention=GROUPED,
    first_k_dense_replace=LAYERS,
    intermediate_size=12,
    rope=RopeConfig(
        interleaved=False, scaling="llama3", factor=4.0, original_max_position_embeddings=16
    ),
)
PLAIN: dict[str, Any] = dict(
    scoring_func="softmax",
    topk_method="greedy",
    num_expert_groups=1,
    num_limited_groups=1,
    routed_scaling_factor=1.0,
)
V2 = dict(
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    num_shared_experts=1,
    expert_loss_weight=0.1,
    device_loss_weight=0.2,
    communication_loss_weight=0.3,
    num_device_groups=4,
    token_dropping="device",
    capacity_factor=0.5,
    capacity_group=2,
)
SWITCH = dict(
    num_experts_per_tok=1,
    norm_topk_prob=False,
    switch_loss_weight=0.1,
    z_loss_weight=0.01,
    token_dropping="expert",
    capacity_factor=0.5,
    capacity_group=None,
)
EIGHT = {"fsdp": 2, "expert_outer": 2, "expert": 2}
# What a family is, and how its step is cut and spread. Losses and capacities of a micro-batch
# depend on how many there are.
FAMILIES: dict[str, tuple[Config, int, dict[str, int]]] = {
    "v3": (
        _family(
            {"num_shared_experts": 1, "sequence_loss_weight": 0.1},
            attention=dataclasses.replace(CONFIG.model.attention, q_lora_rank=6),
            rope=RopeConfig(scaling="yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0),
            first_k_dense_replace=1,
            intermediate_size=12,
            num_nextn_predict_layers=2,
        ),
        2,
        {"fsdp": 2, "expert": 2},
    ),
    "v2": (_family(V2), 1, EIGHT),
    "mixtral": (_family({**PLAIN, "mixtral_loss_weight": 0.1}, attention=GROUPED), 1, EIGHT),
    "switch": (_family({**PLAIN, **SWITCH}, attention=GROUPED), 1, EIGHT),
    "llama": (_family({}, **LLAMA, num_nextn_predict_layers=1), 2, {"data": 2, "fsdp": 2}),
    "llama-tied": (_family({}, **LLAMA, tie_word_embeddings=True), 2, {"fsdp": 4}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_all_its_parameters_and_alike_on_a_mesh(name: str) -> None:
    config, micro_batches, axes = FAMILIES[name]
    start = _state(config)
    start["optimizer"] = jax.tree.map(np.zeros_like, start["optimizer"])
    state, metrics = _run(start, _batch(), config=config)
    for path, gradient in jax.tree_util.tree_leaves_with_path(state["optimizer"]["mu"]):
        name_of = jax.tree_util.keystr(path)
        stacked = "blocks" in name_of or "mtp" in name_of
        for layer, part in enumerate(gradient if stacked else gradient[None]):
            assert np.max(np.abs(part)) > 1e-7, f"{name_of}, layer {layer}"
    assert ("head" in state["parameters"]) == (not config.model.tie_word_embeddings)
    assert (metrics["dropped_tokens"] > 0) == (config.model.moe.token_dropping != "none")
    moved = jax.tree.map(np.subtract, state["router_bias"], start["router_bias"])
    assert set(moved) == ({"moe_blocks", "mtp"} if name == "v3" else set())

    split, split_metrics = _run(start, _batch(micro_batches), "full", config, **axes)
    _assert_close(split, state)
    for metric, value in metrics.items():
        if metric != "dispatch_rounds":
            assert split_metrics[metric] == pytest.approx(value, rel=2e-5), metric


def test_evaluation_drops_nothing() -> None:
    config = FAMILIES["switch"][0]
    moe = dataclasses.replace(config.model.moe, token_dropping="none")
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    assert _run(_state(config), _batch(), config=config)[1]["dropped_tokens"] > 0
    with jax.set_mesh(_mesh(())):
        state = jax.device_put(_state(config), _layout((), config))
        batch = jax.device_put(_batch(), sharding.batch_sharding(_mesh(())))
        losses = [
            jax.jit(make_eval_step(each), compiler_options={"xla_backend_optimization_level": 0})(
                state, batch
            )[0]
            for each in (config, whole)
        ]
    assert float(losses[0]) == float(losses[1])


# Every loss that there is, each with a weight of its own.
PER_SEQUENCE = {
    "sequence_loss": 0.5,
    "expert_loss": 0.7,
    "device_loss": 1.1,
    "communication_loss": 1.3,
}
PER_MICRO_BATCH = {"switch_loss": 1.7, "mixtral_loss": 1.9, "z_loss": 0.3}
BALANCE = {**PER_SEQUENCE, **PER_MICRO_BATCH}


def _weighted(weight: float) -> Config:
    """With all losses at `weight` times their weight; gradients are not clipped."""
    moe = {f"{name}_weight": weight * value for name, value in BALANCE.items()}
    config = _family({**moe, "num_device_groups": 4}, num_nextn_predict_layers=2)
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, clip_norm=1e9),
        training=dataclasses.replace(config.training, mtp_loss_weight=0.6 * weight),
    )


def _reaching(segments: np.ndarray, places: int) -> np.ndarray:
    """Tokens whose document has one so many places on."""
    reaching = segments > 0
    reaching[:, -places:] = False
    reaching[:, :-places] &= segments[:, places:] == segments[:, :-places]
    return reaching


def _added_losses(graphdef: nnx.GraphDef, total_weight: float) -> Any:
    """A function of parameters, bias and a micro-batch: gradient of what `_weighted` adds, parts.

    Over a micro-batch of two, out of the papers' equations and what the routers report.
    """

    def added(parameters, bias, batch, counts):
        model = nnx.merge(graphdef, parameters, bias)
        inputs = [batch[name] for name in ("tokens", "segment_ids", "positions")]
        hidden, main = model.hidden_states(*inputs, training=True)
        ahead = model.predict_ahead(hidden, *inputs, training=True)
        parts = dict.fromkeys(BALANCE, 0.0) | {"mtp_loss": 0.0}
        for stats, tokens in ((main, counts["main"]), (ahead.stats, counts["ahead"])):
            for name in PER_SEQUENCE:
                parts[name] += jnp.sum(stats.sequence_losses[name]) / ROWS
            f, p = stats.load_E / tokens[:, None] / TOP_K, stats.share_E / tokens[:, None]
            parts["switch_loss"] += EXPERTS * jnp.sum(f * p) / 2
            mixtral = TOP_K * EXPERTS * jnp.sum(jnp.mean(f, axis=0) * jnp.mean(p, axis=0))
            parts["mixtral_loss"] += mixtral / 2
            parts["z_loss"] += jnp.sum(stats.z / tokens) / 2
        for k in (1, 2):
            logits = jax.nn.log_softmax(model.logits(ahead.hidden_KBLD[k - 1]), axis=-1)
            targets = jnp.roll(batch["targets"], -k, axis=1)
            nll = -jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            weights = jnp.roll(batch["loss_weights"], -k, axis=1) * batch[f"reaching_{k}"]
            parts["mtp_loss"] += jnp.sum(weights * nll) / total_weight / 2
        factors = {**BALANCE, "mtp_loss": 0.6}
        return sum(factors[name] * value for name, value in parts.items()), parts

    return jax.jit(
        jax.grad(added, has_aux=True), compiler_options={"xla_backend_optimization_level": 0}
    )


def test_every_loss_is_reported_and_counts_by_its_weight() -> None:
    """Over two micro-batches, recomputed: what the losses add to the gradient and the metrics."""
    with_all, without = _weighted(1.0), _weighted(0.0)
    start, batch = _state(with_all), _batch(2)
    start["optimizer"] = jax.tree.map(np.zeros_like, start["optimizer"])
    state, metrics = _run(start, batch, "full", with_all)
    plain_state, plain = _run(start, batch, "full", without)
    assert {name for name in metrics if name.endswith("loss")} == {"loss", "mtp_loss", *BALANCE}
    assert {name for name in plain if name.endswith("loss")} == {"loss", "mtp_loss"}
    for name in ("loss", "mtp_loss"):
        assert plain[name] == pytest.approx(metrics[name], rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state["router_bias"], plain_state["router_bias"])

    with jax.set_mesh(_mesh(())):
        function = _added_losses(graph(with_all), float(np.sum(batch["loss_weights"])))
        expected = None
        placed = jax.device_put(start, _layout((), with_all))
        for i in range(2):
            micro_batch = {name: array[i] for name, array in batch.items()}
            segments = micro_batch["segment_ids"]
            reaching = {k: _reaching(segments, k) for k in (1, 2)}
            micro_batch |= {f"reaching_{k}": x.astype(np.float32) for k, x in reaching.items()}
            counts = {
                "main": np.full(LAYERS, np.sum(segments > 0), np.float32),
                "ahead": np.array([np.sum(x) for x in reaching.values()], np.float32),
            }
            micro_batch = jax.device_put(micro_batch, jax.NamedSharding(_mesh(()), sharding.BATCH))
            arguments = (placed["parameters"], placed["router_bias"], micro_batch, counts)
            found = jax.device_get(function(*arguments))
            expected = found if expected is None else jax.tree.map(np.add, expected, found)
        gradients, parts = expected
    for name, value in parts.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
        assert value > 0.1, name
    added = jax.tree.map(
        lambda a, b: (a - b) / (1 - CONFIG.optimizer.b1),
        state["optimizer"]["mu"],
        plain_state["optimizer"]["mu"],
    )

    def close(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        scale = np.max(np.abs(b))
        np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(close, added, gradients)


class Whole(NamedTuple):
    """Of the whole batch: plain calls of the model, and the step of evaluation."""

    logits: np.ndarray
    load_LE: np.ndarray
    eval_loss: float
    eval_weight: float


@pytest.fixture(scope="module")
def whole() -> Whole:
    with jax.set_mesh(_mesh(())):
        eval_step, graphdef = make_eval_step(CONFIG), graph(CONFIG)

        @jax.jit
        def call(state, batch):
            model = nnx.merge(graphdef, state["parameters"], state["router_bias"])
            hidden, stats = model.hidden_states(
                *(batch[name][0] for name in ("tokens", "segment_ids", "positions"))
            )
            return model.logits(hidden), stats.load_E, *eval_step(state, batch)

        batch = jax.device_put(_batch(), sharding.batch_sharding(_mesh(())))
        return Whole(*jax.device_get(call(jax.device_put(_state(), _layout(())), batch)))


def test_loss_is_the_weighted_mean_over_the_global_batch(whole: Whole) -> None:
    logits, batch = whole.logits.astype(np.float64), _batch()
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    nll = -np.take_along_axis(log_probs, batch["targets"][0][..., None], axis=-1)[..., 0]
    weights = batch["loss_weights"][0]
    expected = np.sum(weights * nll) / np.sum(weights)
    assert _reference()[1]["loss"] == pytest.approx(expected, rel=1e-5)
    assert whole.eval_weight == pytest.approx(np.sum(weights))
    assert whole.eval_loss / whole.eval_weight == pytest.approx(expected, rel=1e-5)


def test_router_bias_moves_once_by_the_load_of_the_whole_batch(whole: Whole) -> None:
    load_LE = whole.load_LE
    # The load itself: every valid token chooses TOP_K experts, padding none.
    assert np.all(np.sum(load_LE, axis=1) == TOP_K * np.sum(_batch()["segment_ids"] > 0))
    mean = np.mean(load_LE, axis=1, keepdims=True)
    expected = 0.25 * np.sign(mean - load_LE)

    for micro_batches, rematerialization in ((1, "none"), (4, "full")):
        state = _state()
        new, metrics = _run(state, _batch(micro_batches), rematerialization)
        (before,), (after,) = (jax.tree.leaves(tree["router_bias"]) for tree in (state, new))
        np.testing.assert_allclose(after - before, expected, atol=1e-6)
        violation = (np.max(load_LE, axis=1) - mean[:, 0]) / mean[:, 0]
        assert metrics["max_violation"] == pytest.approx(np.mean(violation))
        assert metrics["max_violation_worst_layer"] == pytest.approx(np.max(violation))


def test_router_bias_is_no_parameter() -> None:
    state = _shapes()

    def names(tree: Any) -> set[str]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}

    parameters = names(state["parameters"])
    assert names(state["router_bias"]) == {"moe_blocks/moe/router/bias"}
    assert not any("bias" in name for name in parameters)
    assert names(state["optimizer"]["mu"]) == names(state["optimizer"]["nu"]) == parameters
    assert names(state["ema"]) == parameters


def _poison_weight(value: float) -> Any:
    def poison(parameters: Any) -> None:
        parameters["moe_blocks"]["moe"]["gate"][0, 0, 0, 0] = value
        parameters["embedding"]["weight"][:] = value

    return poison


def _poison_gradient(parameters: Any) -> None:
    """The loss stays finite; the norm's gradient is beyond what float32 can square."""
    parameters["norm"]["scale"] *= 1e-25
    parameters["head"]["weight"] *= 1e25


@pytest.mark.parametrize(
    ("poison", "loss_is_finite"),
    [(_poison_weight(np.nan), False), (_poison_weight(np.inf), False), (_poison_gradient, True)],
    ids=["nan", "inf", "gradient"],
)
def test_a_step_that_is_not_finite_changes_nothing(poison: Any, loss_is_finite: bool) -> None:
    state = _state()
    poison(state["parameters"])
    state["step"] = state["update"].copy()
    new, metrics = _run(state, _batch())
    assert math.isfinite(metrics["loss"]) == loss_is_finite
    assert not math.isfinite(metrics["grad_norm"])
    for name in FROZEN:
        jax.tree.map(np.testing.assert_array_equal, new[name], state[name])
    assert new["step"] == state["step"] + 1
    assert metrics["skipped_updates"] == 1

    # The next good batch makes the update that was skipped, and no other.
    good = _state()["parameters"]
    new, metrics = _run({**new, "parameters": good}, _batch())
    assert metrics["skipped_updates"] == 1
    _assert_close({name: new[name] for name in FROZEN}, {n: _reference()[0][n] for n in FROZEN})


def test_counts_schedule_and_moving_average() -> None:
    state, (new, metrics) = _state(), _reference()
    assert (new["step"], new["update"]) == (8, 6)
    assert metrics["skipped_updates"] == 2  # as they were before: step 7, update 5
    rate = learning_rate(CONFIG.optimizer, CONFIG.training.num_steps, jnp.int32(5))
    assert metrics["learning_rate"] == pytest.approx(float(rate))
    expected = jax.tree.map(
        lambda old, parameter: 0.75 * old + 0.25 * parameter, state["ema"], new["parameters"]
    )
    _assert_close(new["ema"], expected)


def test_metrics_of_the_batch() -> None:
    metrics = _reference()[1]
    assert metrics["packing_efficiency"] == pytest.approx(62 / 128)
    assert metrics["dropped_tokens"] == 0
    assert metrics["dispatch_rounds"] >= 1


def test_the_state_keeps_its_form() -> None:
    axes = {"fsdp": 2, "expert_outer": 2, "expert": 2}
    before, after, _ = _run_on_devices(_state(), _batch(), "full", **axes)

    def form(tree: Any) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)

    assert form(after) == form(before)
    # The test has teeth: some parameters are split.
    assert not after["parameters"]["moe_blocks"]["moe"]["gate"].is_fully_replicated


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    state = _state()
    rng = np.random.default_rng(2)
    state["parameters"] = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            np.ones_like(x)
            if path[-1].key == "scale"
            else 0.02 * rng.standard_normal(x.shape, np.float32)
        ),
        state["parameters"],
    )
    assert _run(state, _batch())[1]["loss"] == pytest.approx(math.log(VOCAB), abs=0.02)


def test_the_parts_of_a_step_are_named() -> None:
    """A trace shows these names."""
    with jax.set_mesh(_mesh(())):
        batch = jax.device_put(_batch(), sharding.batch_sharding(_mesh(())))
        lowered = _step((), 1, "none").lower(jax.device_put(_state(), _layout(())), batch)
    text = lowered.as_text(debug_info=True)
    for scope in ("embedding", "attention", "moe", "router", "dispatch", "loss", "optimizer"):
        assert re.search(rf'["/(]{scope}[/)]', text), scope
