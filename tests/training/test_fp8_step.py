"""The step with products in eight bits."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from step_runs import CONFIG, layout_of, make_batch, make_state, run

from moe_jax.config import CheckpointConfig, Config
from moe_jax.ops import fp8_state
from moe_jax.training.checkpoint import Checkpoints


def _config(**precision: Any) -> Config:
    precision = {"compute_dtype": "float32", **precision}
    changed = dataclasses.replace(CONFIG.precision, **precision)
    return dataclasses.replace(CONFIG, precision=changed)


def _state(config: Config) -> Any:
    """Nothing is remembered of operands."""
    state = make_state(config)
    if "fp8" in state:
        state["fp8"] = jax.tree.map(np.zeros_like, state["fp8"])
    return state


def _moved(config: Config, **axes: int) -> tuple[Any, Any, Any]:
    """Parameters' changes, the new state and the metrics."""
    before = _state(config)
    after, metrics = run(before, make_batch(2), "none", config, **axes)
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, after["parameters"], before["parameters"])
    return change, after, metrics


def test_moves_as_float32_does() -> None:
    exact, _, wide = _moved(CONFIG)
    rounded, _, metrics = _moved(_config(recipe="fp8_block"))
    assert float(metrics["loss"]) == pytest.approx(float(wide["loss"]), rel=0.02)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(rounded), strict=True
    ):
        cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert cosine > 0.98, path


def test_is_the_same_on_a_mesh() -> None:
    config = _config(recipe="fp8_block")
    one, _, first = _moved(config)
    many, _, second = _moved(config, fsdp=2, expert=2)
    assert float(second["loss"]) == pytest.approx(float(first["loss"]), rel=0.01)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (one, many)]
    # Tokens on their way to experts, and the rows that share a scale, are rounded otherwise.
    assert np.vdot(*flat) / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]) > 0.99


def test_history_moves_on_and_reports_are_finite() -> None:
    config = _config(recipe="fp8_delayed", fp8_report=True)
    state = _state(config)
    for leaf in jax.tree.leaves(state["fp8"]):
        leaf[..., : fp8_state.HISTORY] = np.arange(1, 1 + fp8_state.HISTORY)
    after, metrics = run(state, make_batch(2), "none", config)
    for new in jax.tree.leaves(after["fp8"]):
        kept = new[..., 1 : fp8_state.HISTORY]
        np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(1, 16), kept.shape))
    reports = {name: value for name, value in metrics.items() if name.startswith("fp8/")}
    assert {name.split("/")[1] for name in reports} == {"moe_blocks_0", "moe_blocks_1"}
    assert all(np.isfinite(value) for value in reports.values())


def test_a_product_that_errs_too_much_takes_its_operands_as_they_are() -> None:
    config = _config(recipe="fp8_block", fp8_report=True, fp8_error_bound=1e-6)
    state = _state(config)
    _, metrics = run(state, make_batch(), "none", config)
    products = sum(np.prod(leaf.shape[:-2]) for leaf in jax.tree.leaves(state["fp8"]))
    assert float(metrics["fp8_exact"]) == products


def test_moments_are_stored_narrow() -> None:
    optimizer = dataclasses.replace(CONFIG.optimizer, moments_dtype="bfloat16")
    change, after, _ = _moved(dataclasses.replace(CONFIG, optimizer=optimizer))
    exact, _, _ = _moved(CONFIG)
    assert {str(x.dtype) for x in jax.tree.leaves(after["optimizer"])} == {"bfloat16"}
    for a, b in zip(jax.tree.leaves(change), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def test_what_products_remember_is_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = _config(recipe="fp8_delayed", fp8_report=True, fp8_error_bound=0.06)
    state = _state(config)
    for _ in range(2):
        state, _ = run(state, make_batch(2), "none", config)
    histories = [leaf[..., : fp8_state.HISTORY] for leaf in jax.tree.leaves(state["fp8"])]
    assert all(np.all(np.sum(history > 0, axis=-1) == 2) for history in histories)
    exact = [leaf[..., fp8_state.EXACT] for leaf in jax.tree.leaves(state["fp8"])]
    assert 0 < np.mean(np.concatenate([x.ravel() for x in exact])) < 1, "some passed the bound"
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    checkpoints.save(2, jax.device_put(state), {})
    checkpoints.wait()
    layout = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        layout_of((), config),
    )
    restored = jax.device_get(checkpoints.restore(2, layout))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, jax.device_get(state))
    # And what it remembers counts: without it, the next step is another one.
    forgotten = {**state, "fp8": _state(config)["fp8"]}
    after, resumed, other = (
        run(s, make_batch(2), "none", config)[0] for s in (state, restored, forgotten)
    )
    jax.tree.map(np.testing.assert_array_equal, resumed, after)
    changed = jax.tree.map(np.array_equal, other["parameters"], after["parameters"])
    assert not all(jax.tree.leaves(changed))
