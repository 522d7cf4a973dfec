"""One step: the same however the batch is cut and spread, and harmless where it goes wrong."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from step_runs import (
    CONFIG,
    FROZEN,
    TOP_K,
    VOCAB,
    assert_close,
    compiled_step,
    layout_of,
    make_batch,
    make_state,
    mesh_of,
    reference,
    run,
    run_on_devices,
    shapes_of,
)

from moe_jax import sharding
from moe_jax.schedules import scheduled
from moe_jax.training.step import graph, make_eval_step


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
    state, metrics = run(make_state(), make_batch(micro_batches), rematerialization, **axes)
    expected_state, expected_metrics = reference()
    assert_close(state, expected_state)
    for name, value in expected_metrics.items():
        if name != "dispatch_rounds":  # buffers follow the tokens of a device
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("axes", [{}, {"data": 2, "expert": 2}], ids=str)
def test_tokens_that_travel_in_parts_make_the_same_update(axes: dict[str, int]) -> None:
    moe = dataclasses.replace(CONFIG.model.moe, exchange_parts=2)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, moe=moe))
    state, metrics = run(make_state(), make_batch(), "full", config, **axes)
    expected_state, expected_metrics = reference()
    assert_close(state, expected_state)
    for name, value in expected_metrics.items():
        if name != "dispatch_rounds":
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-12, err_msg=name)


class Whole(NamedTuple):
    """Of the whole batch: plain calls of the model, and the step of evaluation."""

    logits: np.ndarray
    load_LE: np.ndarray
    eval_loss: float
    eval_weight: float


@pytest.fixture(scope="module")
def whole() -> Whole:
    with jax.set_mesh(mesh_of(())):
        eval_step, graphdef = make_eval_step(CONFIG), graph(CONFIG)

        @jax.jit
        def call(state, batch):
            model = nnx.merge(graphdef, state["parameters"], state["router_bias"])
            hidden, stats = model.hidden_states(
                *(batch[name][0] for name in ("tokens", "segment_ids", "positions"))
            )
            return model.logits(hidden), stats.load_E, *eval_step(state, batch)

        batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh_of(())))
        return Whole(*jax.device_get(call(jax.device_put(make_state(), layout_of(())), batch)))


def test_loss_is_the_weighted_mean_over_the_global_batch(whole: Whole) -> None:
    logits, batch = whole.logits.astype(np.float64), make_batch()
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    nll = -np.take_along_axis(log_probs, batch["targets"][0][..., None], axis=-1)[..., 0]
    weights = batch["loss_weights"][0]
    expected = np.sum(weights * nll) / np.sum(weights)
    assert reference()[1]["loss"] == pytest.approx(expected, rel=1e-5)
    assert whole.eval_weight == pytest.approx(np.sum(weights))
    assert whole.eval_loss / whole.eval_weight == pytest.approx(expected, rel=1e-5)


def test_router_bias_moves_once_by_the_load_of_the_whole_batch(whole: Whole) -> None:
    load_LE = whole.load_LE
    # The load itself: every valid token chooses TOP_K experts, padding none.
    assert np.all(np.sum(load_LE, axis=1) == TOP_K * np.sum(make_batch()["segment_ids"] > 0))
    mean = np.mean(load_LE, axis=1, keepdims=True)
    expected = 0.25 * np.sign(mean - load_LE)

    for micro_batches, rematerialization in ((1, "none"), (4, "full")):
        state = make_state()
        new, metrics = run(state, make_batch(micro_batches), rematerialization)
        (before,), (after,) = (jax.tree.leaves(tree["router_bias"]) for tree in (state, new))
        np.testing.assert_allclose(after - before, expected, atol=1e-6)
        violation = (np.max(load_LE, axis=1) - mean[:, 0]) / mean[:, 0]
        assert metrics["max_violation"] == pytest.approx(np.mean(violation))
        assert metrics["max_violation_worst_layer"] == pytest.approx(np.max(violation))


def test_router_bias_is_no_parameter() -> None:
    state = shapes_of()

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
    state = make_state()
    poison(state["parameters"])
    state["step"] = state["update"].copy()
    new, metrics = run(state, make_batch())
    assert math.isfinite(metrics["loss"]) == loss_is_finite
    assert not math.isfinite(metrics["grad_norm"])
    for name in FROZEN:
        jax.tree.map(np.testing.assert_array_equal, new[name], state[name])
    assert new["step"] == state["step"] + 1
    assert metrics["skipped_updates"] == 1
    assert metrics["first_router_not_finite"] == (-1 if loss_is_finite else 0)

    # The next good batch makes the update that was skipped, and no other.
    good = make_state()["parameters"]
    new, metrics = run({**new, "parameters": good}, make_batch())
    assert metrics["skipped_updates"] == 1
    assert metrics["first_router_not_finite"] == -1
    assert_close({name: new[name] for name in FROZEN}, {n: reference()[0][n] for n in FROZEN})


def test_counts_schedule_and_moving_average() -> None:
    state, (new, metrics) = make_state(), reference()
    assert (new["step"], new["update"]) == (8, 6)
    assert metrics["skipped_updates"] == 2  # as they were before: step 7, update 5
    expected = jax.tree.map(
        lambda old, parameter: 0.75 * old + 0.25 * parameter, state["ema"], new["parameters"]
    )
    assert_close(new["ema"], expected)


def test_metrics_of_the_batch() -> None:
    metrics = reference()[1]
    assert metrics["packing_efficiency"] == pytest.approx(62 / 128)
    assert metrics["dropped_tokens"] == 0
    assert metrics["dispatch_rounds"] >= 1


def test_the_state_keeps_its_form() -> None:
    axes = {"fsdp": 2, "expert_outer": 2, "expert": 2}
    before, after, _ = run_on_devices(make_state(), make_batch(), "full", **axes)

    def form(tree: Any) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)

    assert form(after) == form(before)
    # The test has teeth: some parameters are split.
    assert not after["parameters"]["moe_blocks"]["moe"]["gate"].is_fully_replicated


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    state = make_state()
    rng = np.random.default_rng(2)
    state["parameters"] = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            np.ones_like(x)
            if path[-1].key == "scale"
            else 0.02 * rng.standard_normal(x.shape, np.float32)
        ),
        state["parameters"],
    )
    assert run(state, make_batch())[1]["loss"] == pytest.approx(math.log(VOCAB), abs=0.02)


def test_the_parts_of_a_step_are_named() -> None:
    """A trace shows these names."""
    with jax.set_mesh(mesh_of(())):
        batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh_of(())))
        lowered = compiled_step((), 1, "none").lower(
            jax.device_put(make_state(), layout_of(())), batch, scheduled(CONFIG, 0)
        )
    text = lowered.as_text(debug_info=True)
    for scope in ("embedding", "attention", "moe", "router", "dispatch", "loss", "optimizer"):
        assert re.search(rf'["/(]{scope}[/)]', text), scope
