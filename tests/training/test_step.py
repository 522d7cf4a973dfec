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
def _shapes() -> Any:
    with jax.set_mesh(_mesh(())):
        return jax.eval_shape(lambda: init_state(CONFIG))


def _state() -> Any:
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

    return jax.tree_util.tree_map_with_path(value, _shapes())


@functools.cache
def _layout(axes: tuple[tuple[str, int], ...]) -> Any:
    """The sharding of each array of the state."""
    with jax.set_mesh(_mesh(axes)):
        return jax.tree.map(
            # Scalars have no sharding here.
            lambda x: jax.NamedSharding(_mesh(axes), x.sharding.spec if x.sharding else jax.P()),
            jax.eval_shape(lambda: init_state(CONFIG)),
        )


@functools.cache
def _step(axes: tuple[tuple[str, int], ...], micro_batches: int, rematerialization: str) -> Any:
    training = dataclasses.replace(
        CONFIG.training, micro_batches=micro_batches, rematerialization=rematerialization
    )
    with jax.set_mesh(_mesh(axes)):
        return jax.jit(
            make_train_step(dataclasses.replace(CONFIG, training=training)),
            # Compiling is what takes the time here.
            compiler_options={"xla_backend_optimization_level": 0},
        )


def _run(
    state: Any,
    batch: dict[str, np.ndarray],
    rematerialization: str = "none",
    **axes: int,
) -> tuple[Any, dict[str, Any]]:
    """The state after the step and the metrics, both on the host."""
    new, metrics = _run_on_devices(state, batch, rematerialization, **axes)[1:]
    return jax.device_get(new), {name: value.item() for name, value in metrics.items()}


def _run_on_devices(
    state: Any, batch: dict[str, np.ndarray], rematerialization: str = "none", **axes: int
) -> tuple[Any, Any, Any]:
    key = tuple(sorted(axes.items()))
    step = _step(key, len(batch["tokens"]), rematerialization)
    with jax.set_mesh(_mesh(key)):
        before = jax.device_put(state, _layout(key))
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
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6 * scale, err_msg=name)

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
