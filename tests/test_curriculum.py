"""Which stage a step belongs to, the tokens seen by then, and what ramps and scales turn into."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import Config, DataConfig, OptimizerConfig, Phase, Stage, TrainingConfig
from moe_jax.curriculum import (
    at_stage,
    last_stage_alike,
    main_stage,
    micro_batches,
    num_rows,
    resolved,
    stage_at,
    stage_starts,
    tokens_after,
    tokens_per_step,
)

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=50)


def _config(*stages: Stage, **training: Any) -> Config:
    return Config(
        data=DataConfig(stages=stages),
        training=TrainingConfig(**{"tokens_per_step": 128, "num_steps": 10} | training),
    )


CONFIG = _config(Stage(8, 300), Stage(16, 400, tokens_per_step=256), Stage(32, 401), Stage(64))


def test_a_stage_ends_with_the_step_that_reaches_its_end_and_has_one_at_least() -> None:
    # After three steps of 128, one of 256 and one of 128 that comes too late.
    assert stage_starts(CONFIG) == [0, 3, 4, 5]
    assert stage_starts(_config(Stage(8, 256), Stage(16, 513), Stage(32))) == [0, 2, 5]
    assert stage_starts(Config()) == [0]
    assert [tokens_after(CONFIG, steps) for steps in (0, 1, 3, 4, 5, 6)] == [
        *(0, 128, 384, 640, 768, 896)
    ]
    assert tokens_after(CONFIG, 10**12) == 768 + (10**12 - 5) * 128


@pytest.mark.parametrize(
    ("step", "length", "rows"),
    [(0, 8, 16), (2, 8, 16), (3, 16, 16), (4, 32, 4), (5, 64, 2), (6, 64, 2), (10**9, 64, 2)],
)
def test_stage_at_and_its_rows(step: int, length: int, rows: int) -> None:
    stage = stage_at(CONFIG, step)
    assert stage.sequence_length == length
    assert num_rows(CONFIG, stage) == rows


@repeatable
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 40)), max_size=5),
    st.integers(0, 300),
)
def test_tokens_are_those_of_the_steps_one_by_one(sizes: list[tuple[int, int]], step: int) -> None:
    end, stages = 0, []
    for more, tokens in sizes:
        end += more
        stages.append(Stage(1, end, tokens_per_step=tokens))
    config = _config(*stages, Stage(1))
    for each in range(step):
        of_step = tokens_per_step(config, stage_at(config, each))
        assert tokens_after(config, each + 1) - tokens_after(config, each) == of_step
    starts = stage_starts(config)
    assert all(a < b for a, b in zip(starts[:-1], starts[1:], strict=True))
    for stage, start in zip(stages, starts[1:], strict=False):
        assert tokens_after(config, start) >= (stage.until_tokens or 0)


def test_micro_batches_keep_their_size() -> None:
    config = _config(Stage(8), tokens_per_step=1024, micro_batches=8)
    sizes = {128: 1, 256: 2, 1024: 8, 2048: 16, 320: 3}
    assert {t: micro_batches(config, Stage(8, tokens_per_step=t)) for t in sizes} == sizes
    assert micro_batches(config, Stage(8, tokens_per_step=1024, micro_batches=2)) == 2


def test_a_run_that_ends_with_its_last_stage() -> None:
    config = resolved(_config(Stage(8, 300), Stage(16, 1000), num_steps=0))
    assert config.training.num_steps == 8  # 3, and 5 for the 616 tokens left
    assert config.data.stages == (Stage(8, 300), Stage(16))
    assert resolved(config) == config


def test_a_scale_multiplies_every_end() -> None:
    config = _config(Stage(8, 10**9), Stage(16, 4 * 10**9), num_steps=0, recipe_scale=1e-6)
    phases = (Phase(1.0, 2 * 10**9), Phase(0.5))
    training = dataclasses.replace(config.training, mtp_loss_weight=phases)
    config = dataclasses.replace(
        config, training=training, optimizer=OptimizerConfig(warmup_steps=2_000_000)
    )
    small = resolved(config)
    assert stage_starts(small) == [0, 8]
    assert small.training.num_steps == 8 + 24
    assert small.training.mtp_loss_weight == (Phase(1.0, 2000), Phase(0.5))
    assert (small.optimizer.warmup_steps, small.training.recipe_scale) == (2, 1.0)
    assert resolved(_config(Stage(8), num_steps=5000, recipe_scale=0.01)).training.num_steps == 50
    # However small: a step of each stage.
    least = resolved(
        _config(Stage(8, 10**9), Stage(16, 2 * 10**9), num_steps=0, recipe_scale=1e-30)
    )
    assert stage_starts(least) == [0, 1] and least.training.num_steps == 2


def _shapes(config: Config) -> list[tuple[int, int, int | None]]:
    return [
        (stage.sequence_length, num_rows(config, stage), stage.until_tokens)
        for stage in config.data.stages
    ]


def test_a_ramp_of_the_batch() -> None:
    """DeepSeek-V3's, of rows that 2,048 devices divide."""
    ramp = Stage(4096, 469 * 10**9, from_tokens_per_step=4096 * 4096)
    config = _config(ramp, Stage(4096), tokens_per_step=16384 * 4096, micro_batches=8)
    plain = resolved(config)
    billions = [(length, rows, until and until / 10**9) for length, rows, until in _shapes(plain)]
    assert billions == [
        (4096, 4096, pytest.approx(469 * 2.5 / 7)),
        (4096, 8192, pytest.approx(469 * 4.5 / 7)),
        (4096, 12288, pytest.approx(469 * 6.5 / 7)),
        (4096, 16384, 469),
        (4096, 16384, None),
    ]
    assert [micro_batches(plain, stage) for stage in plain.data.stages] == [2, 4, 6, 8, 8]


def test_a_ramp_of_the_length() -> None:
    ramp = Stage(1024, 90_000, from_sequence_length=128, ramp_shapes=4, ramp="sqrt")
    config = resolved(_config(Stage(128, 10_000), ramp, Stage(1024), tokens_per_step=8192))
    assert _shapes(config) == [
        (128, 64, 10_000),
        # Roots of 1/6, 1/2, 5/6 of the way.
        (128, 64, 10_000 + round(80_000 / 36)),
        (384, 16, 10_000 + 80_000 // 4),
        (768, 8, 10_000 + round(80_000 * 25 / 36)),
        (1024, 8, 90_000),
        (1024, 8, None),
    ]


@repeatable
@given(
    st.integers(1, 8),
    st.integers(1, 32),
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(2, 12),
    st.sampled_from(["linear", "sqrt"]),
)
def test_levels_of_ramps(
    first: int, last: int, rows: int, more: int, shapes: int, ramp: str
) -> None:
    """They are as many as said at most; what divides both ends divides each; ends grow."""
    lengths, tokens = (128 * first, 128 * last), (8 * rows * 128 * first, 8 * more * 128 * last)
    stage = Stage(
        lengths[1],
        10**9,
        tokens_per_step=tokens[1],
        from_sequence_length=lengths[0],
        from_tokens_per_step=tokens[0],
        ramp=ramp,
        ramp_shapes=shapes,
    )
    config = resolved(_config(stage, Stage(128)))
    *levels, _ = config.data.stages
    assert 1 <= len(levels) <= shapes
    for level in levels:
        assert level.sequence_length % 128 == 0
        assert tokens_per_step(config, level) % (8 * level.sequence_length) == 0
    assert (levels[0].sequence_length, levels[0].tokens_per_step) == (lengths[0], tokens[0])
    assert (levels[-1].sequence_length, levels[-1].tokens_per_step) == (lengths[1], tokens[1])
    ends = [level.until_tokens or 0 for level in levels]
    assert sorted(set(ends)) == ends and ends[-1] == 10**9


def test_rotary_scaling_of_a_stage() -> None:
    config = _config(Stage(8, 100), Stage(16, 200), Stage(32, 300, rope_factor=40.0), Stage(64))
    first, second, third, last = config.data.stages
    assert at_stage(config, first) == config
    rope = at_stage(config, third).model.rope
    assert (rope.scaling, rope.factor) == ("yarn", 40.0)
    assert [last_stage_alike(config, s) for s in (first, second, third, last)] == [
        *(second, second, third, last)
    ]


def test_the_main_stage_sees_the_most_tokens() -> None:
    assert main_stage(CONFIG).sequence_length == 64
    assert main_stage(_config(Stage(8, 1000), Stage(16))).sequence_length == 8
    assert main_stage(_config(Stage(8, 10**6), Stage(16))).sequence_length == 8
