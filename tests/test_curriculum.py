"""Which stage a step belongs to."""

import dataclasses

import pytest

from moe_jax.config import Config, DataConfig, Stage, TrainingConfig
from moe_jax.curriculum import num_rows, stage_at, stage_starts

CONFIG = Config(
    data=DataConfig(stages=(Stage(8, 300), Stage(16, 100), Stage(32, 1), Stage(64))),
    training=TrainingConfig(tokens_per_step=128),
)


def test_a_stage_lasts_as_many_whole_steps_as_cover_its_tokens() -> None:
    assert stage_starts(CONFIG) == [0, 3, 4, 5]
    exact = dataclasses.replace(
        CONFIG, data=DataConfig(stages=(Stage(8, 256), Stage(16, 257), Stage(32)))
    )
    assert stage_starts(exact) == [0, 2, 5]
    assert stage_starts(Config()) == [0]


@pytest.mark.parametrize(
    ("step", "length"), [(0, 8), (2, 8), (3, 16), (4, 32), (5, 64), (6, 64), (10**9, 64)]
)
def test_stage_at_and_its_rows(step: int, length: int) -> None:
    stage = stage_at(CONFIG, step)
    assert stage.sequence_length == length
    assert num_rows(CONFIG, stage) == 128 // length
