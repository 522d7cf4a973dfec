"""Schedules by their formulas, at the tokens where they change, and beyond what int32 holds."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from moe_jax.config import Config, MoEConfig, OptimizerConfig, Phase, TrainingConfig
from moe_jax.schedules import changing, learning_rate, scheduled, value_at

T = 10**12
# DeepSeek-V3, section 4.2, with the warm-up in tokens.
V3 = (
    Phase(2.2e-4, 25 * 10**9, "linear"),
    Phase(2.2e-4, 10 * T),
    Phase(2.2e-5, 14_300 * 10**9, "cosine"),
    Phase(2.2e-5, 14_633 * 10**9),
    Phase(7.3e-6),
)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (10**9, 2.2e-4 / 25),
        (25 * 10**9, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 1, 2.2e-4),
        (12_150 * 10**9, 0.5 * (2.2e-4 + 2.2e-5)),
        (11_075 * 10**9, 2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4))),
        (14_300 * 10**9, 2.2e-5),
        (14_633 * 10**9, 2.2e-5),
        (14_633 * 10**9 + 1, 7.3e-6),
        (14_800 * 10**9, 7.3e-6),
        (20 * T, 7.3e-6),
    ],
)
def test_phases(tokens: int, value: float) -> None:
    assert value_at(V3, tokens, 14_800 * 10**9) == pytest.approx(value, rel=1e-9)


def test_a_phase_without_an_end_lasts_to_that_of_the_run_and_the_last_value_stays() -> None:
    phases = (Phase(1.0, 10), Phase(3.0, None, "linear"))
    assert [value_at(phases, tokens, 20) for tokens in (10, 15, 20, 30)] == [1.0, 2.0, 3.0, 3.0]
    # A run that ends within the first phase, or just with it.
    assert value_at(phases, 5, 5) == value_at(phases, 10, 10) == 1.0
    assert value_at((Phase(1.0, 10), Phase(3.0, 20, "linear")), 30, 40) == 3.0
    assert value_at(0.7, 10**15, 1) == 0.7


def _config(**optimizer: Any) -> Config:
    return Config(
        optimizer=OptimizerConfig(**{"peak_lr": 0.1, "final_lr": 0.01} | optimizer),
        training=TrainingConfig(num_steps=10, tokens_per_step=2**32),
    )


def _rates(config: Config) -> list[float]:
    return [float(scheduled(config, step)["learning_rate"]) for step in range(10)]


def test_warm_up_and_cosine_by_three_fields() -> None:
    expected = [0.1 * done / 4 for done in range(1, 5)] + [
        0.01 + 0.09 * 0.5 * (1 + math.cos(math.pi * (done - 4) / 6)) for done in range(5, 11)
    ]
    assert _rates(_config(warmup_steps=4)) == pytest.approx(expected)
    # No warm-up; and one beyond the run's end.
    assert _rates(_config(warmup_steps=0))[4] == pytest.approx(0.055)
    assert _rates(_config(warmup_steps=20))[-1] == pytest.approx(0.05)


def test_the_three_fields_are_phases_too() -> None:
    plain = _config(warmup_steps=4)
    general = _config(
        peak_lr=None, final_lr=None, warmup_steps=None, lr_phases=learning_rate(plain)
    )
    assert _rates(general) == _rates(plain)


def test_what_the_step_takes() -> None:
    moe = MoEConfig(bias_update_speed=(Phase(0.001, 3 * 2**32), Phase(0.0)), z_loss_weight=0.5)
    config = _config(warmup_steps=4)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    values = [scheduled(config, step) for step in range(5)]
    assert values[0].keys() == {
        *("learning_rate", "bias_update_speed", "mtp_loss_weight"),
        *(f.name for f in dataclasses.fields(MoEConfig) if f.name.endswith("_loss_weight")),
    }
    assert all(type(value) is np.float32 for value in values[0].values())
    # The third batch ends where the phase does.
    assert [float(v["bias_update_speed"]) for v in values] == pytest.approx(3 * [0.001] + 2 * [0.0])
    assert {float(v["z_loss_weight"]) for v in values} == {0.5}
    assert changing(config) == ["learning_rate", "bias_update_speed"]
