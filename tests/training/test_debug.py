"""Steps that are run twice, and NaN traced to where they come from."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import DebugConfig
from moe_jax.fields import RunError
from moe_jax.training.debug import checked, first_nan


def _step(state: Any, x: jax.Array) -> tuple[Any, Any]:
    new = {"w": state["w"] + jnp.sum(jnp.sqrt(x)), "step": state["step"] + 1}
    skipped = ~jnp.isfinite(new["w"])
    kept = {"w": jnp.where(skipped, state["w"], new["w"]), "step": new["step"]}
    return kept, {"loss": new["w"], "update_skipped": skipped.astype(jnp.int32)}


def _state() -> Any:
    return {"w": jnp.float32(0.0), "step": jnp.int32(0)}


def test_a_step_that_repeats_itself_is_run_twice_and_changes_nothing() -> None:
    runs: list[int] = []
    compiled = jax.jit(_step, donate_argnums=0)

    def counted(*inputs: Any) -> Any:
        runs.append(1)
        return compiled(*inputs)

    step = checked(DebugConfig(determinism_check=2), counted, lambda: _step)
    state = _state()
    for number in (1, 2, 3):
        state, _ = step(number, state, jnp.ones(4))
    assert len(runs) == 4 and float(state["w"]) == 12 and int(state["step"]) == 3


def test_another_bit_is_named() -> None:
    noise = iter([0.0, 1e-7])

    def step(state: Any, x: jax.Array) -> Any:
        state, metrics = _step(state, x)
        return {**state, "w": jnp.float32(1.0 + next(noise))}, metrics

    with pytest.raises(RunError, match="step 3, run twice, gave other bits in 1 arrays: w"):
        checked(DebugConfig(determinism_check=3), step, lambda: step)(3, _state(), jnp.ones(4))


def test_the_operation_that_made_a_nan_is_named() -> None:
    run = checked(DebugConfig(nans=True), jax.jit(_step, donate_argnums=0), lambda: _step)
    state, _ = run(1, _state(), jnp.ones(4))
    with pytest.raises(RunError, match="step 2 was skipped: .*sqrt in training/test_debug.py:15"):
        run(2, state, -jnp.ones(4))
    assert first_nan(_step, _state(), jnp.full(4, jnp.inf)) == (
        "no operation makes a NaN; an infinity does"
    )
