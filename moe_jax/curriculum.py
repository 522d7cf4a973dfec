"""Which stage of the curriculum a step belongs to."""

import itertools
import math

from moe_jax.config import Config, Stage


def stage_starts(config: Config) -> list[int]:
    """The first step of each stage; a stage lasts as many whole steps as cover its tokens."""
    lengths = [
        math.ceil((stage.tokens or 0) / config.training.tokens_per_step)
        for stage in config.data.stages[:-1]
    ]
    return [0, *itertools.accumulate(lengths)]


def stage_at(config: Config, step: int) -> Stage:
    """The stage that step `step` (from 0) belongs to."""
    index = sum(start <= step for start in stage_starts(config)) - 1
    return config.data.stages[index]


def tokens_after(config: Config, steps: int) -> int:
    """Tokens seen after so many steps, padding counted."""
    return steps * config.training.tokens_per_step


def num_rows(config: Config, stage: Stage) -> int:
    """Rows of a global batch in this stage."""
    return config.training.tokens_per_step // stage.sequence_length
