"""Values that change as tokens are seen: learning rate, loss weights, the speed of router biases.

They are numbers on the host, exact at any count of tokens, and arguments of the compiled step, so
nothing is compiled again when one changes. A batch has the values at the tokens that are seen once
it is. They follow batches, not updates: what a skipped update would have learned from was seen.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from moe_jax.config import Config, MoEConfig, Phase, Schedule
from moe_jax.curriculum import stage_at, tokens_after

# Fields of the config that may be schedules.
FIELDS = (
    *("training.mtp_loss_weight", "model.moe.bias_update_speed"),
    *(
        f"model.moe.{field.name}"
        for field in dataclasses.fields(MoEConfig)
        if field.name.endswith("_loss_weight")
    ),
)
KINDS = ("constant", "linear", "cosine")


def value_at(schedule: Schedule, tokens: int, end: int) -> float:
    """The value once `tokens` tokens are seen, in a run of `end` tokens."""
    if not isinstance(schedule, tuple):
        return schedule
    before, start = 0.0, 0
    for phase in schedule:
        until = end if phase.until_tokens is None else phase.until_tokens
        if tokens <= until:
            progress = (tokens - start) / (until - start)
            return before + _share(phase.kind, progress) * (phase.value - before)
        before, start = phase.value, until
    return before


def last_value(schedule: Schedule) -> float:
    """The value at the end."""
    return schedule[-1].value if isinstance(schedule, tuple) else schedule


def _share(kind: str, progress: float) -> float:
    """Of the way to a phase's value: 0 to 1."""
    if kind == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    return progress if kind == "linear" else 1.0


def learning_rate(config: Config) -> Schedule:
    """The config's phases, or those of its warm-up and cosine."""
    optimizer = config.optimizer
    if optimizer.lr_phases is not None:
        return optimizer.lr_phases
    peak, final, steps = optimizer.peak_lr, optimizer.final_lr, optimizer.warmup_steps
    assert peak is not None and final is not None and steps is not None  # or it is no valid config
    return (
        Phase(peak, until_tokens=tokens_after(config, steps), kind="linear"),
        Phase(final, kind="cosine"),
    )


def scheduled(config: Config, step: int) -> dict[str, np.float32]:
    """What the train step takes for the batch after `step` batches, by the fields' last names."""
    tokens, end = tokens_after(config, step + 1), tokens_after(config, config.training.num_steps)
    schedules = {name.rpartition(".")[2]: _field(config, name) for name in FIELDS}
    schedules["learning_rate"] = learning_rate(config)
    values = {name: value_at(schedule, tokens, end) for name, schedule in schedules.items()}
    values["learning_rate"] *= stage_at(config, step).learning_rate_factor
    return {name: np.float32(value) for name, value in values.items()}


def changing(config: Config) -> list[str]:
    """Names of `scheduled` whose values change in the course of the run."""
    fields = (name for name in FIELDS if isinstance(_field(config, name), tuple))
    return ["learning_rate", *(name.rpartition(".")[2] for name in fields)]


def _field(config: Config, path: str) -> Schedule:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value
