"""The stages of a run: what they say, which one a step belongs to, and the tokens seen by then.

A stage ends with the first step by which its end in tokens is reached, and has at least one step.
`resolved` turns what a config file may say (ramps, a scale, a run's end in tokens) into plain
stages and a number of steps; everything else reads those.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from moe_jax.config import Config, Phase, RopeConfig, Stage
from moe_jax.fields import UserError

# Lengths of a ramp are multiples of this, or of what both its ends are multiples of.
RAMP_MULTIPLE = 128


def tokens_per_step(config: Config, stage: Stage) -> int:
    """Tokens of a global batch in this stage, padding counted."""
    return stage.tokens_per_step or config.training.tokens_per_step


def num_rows(config: Config, stage: Stage) -> int:
    """Rows of a global batch in this stage."""
    return tokens_per_step(config, stage) // stage.sequence_length


def micro_batches(config: Config, stage: Stage) -> int:
    """Micro-batches of a step; unless the stage says, as many as keep them from growing."""
    training = config.training
    tokens = tokens_per_step(config, stage)
    return stage.micro_batches or -(-training.micro_batches * tokens // training.tokens_per_step)


def masks_documents(config: Config, stage: Stage) -> bool:
    """Whether a row's documents do not see each other in this stage."""
    return config.data.mask_documents if stage.mask_documents is None else stage.mask_documents


def source_weights(config: Config, stage: Stage) -> tuple[float, ...]:
    """The share of the tokens of each source in this stage."""
    return stage.weights or tuple(source.weight for source in config.data.sources)


def at_stage(config: Config, stage: Stage) -> Config:
    """The config with the rotary scaling of this stage: what is compiled, and what is saved."""
    if stage.rope_factor is None:
        return config
    rope = dataclasses.replace(config.model.rope, scaling="yarn", factor=stage.rope_factor)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, rope=rope))


def stage_starts(config: Config) -> list[int]:
    """The first step of each stage, from 0."""
    starts, tokens = [0], 0
    for stage in config.data.stages[:-1]:
        steps = _steps(config, stage, tokens)
        starts.append(starts[-1] + steps)
        tokens += steps * tokens_per_step(config, stage)
    return starts


def _steps(config: Config, stage: Stage, before: int) -> int:
    """How many steps a stage with an end has, `before` tokens having been seen."""
    assert stage.until_tokens is not None
    return max(1, math.ceil((stage.until_tokens - before) / tokens_per_step(config, stage)))


def stage_at(config: Config, step: int) -> Stage:
    """The stage that step `step` (from 0) belongs to."""
    index = sum(start <= step for start in stage_starts(config)) - 1
    return config.data.stages[index]


def tokens_after(config: Config, steps: int) -> int:
    """Tokens seen after so many steps, padding counted."""
    return sum(_tokens_by_stage(config, steps))


def drawn_after(config: Config, steps: int, source: int) -> float:
    """How many of those tokens are of a source, by its weights."""
    tokens = _tokens_by_stage(config, steps)
    return sum(
        of_stage * source_weights(config, stage)[source]
        for of_stage, stage in zip(tokens, config.data.stages, strict=True)
    )


def _tokens_by_stage(config: Config, steps: int) -> list[int]:
    borders = [min(border, steps) for border in (*stage_starts(config), steps)]
    return [
        (end - start) * tokens_per_step(config, stage)
        for stage, (start, end) in zip(config.data.stages, itertools.pairwise(borders), strict=True)
    ]


def steps_until_dry(config: Config, tokens: Sequence[int]) -> tuple[int, int] | None:
    """After how many steps a source must not be drawn on, and which; None: not in this run.

    Args:
      tokens: of one epoch of each source.
    """
    steps = range(config.training.num_steps + 1)
    limits = [
        (bisect.bisect_right(steps, most, key=lambda step: drawn_after(config, step, i)) - 1, i)
        for i, most in enumerate(
            source.epochs and source.epochs * of_source
            for source, of_source in zip(config.data.sources, tokens, strict=True)
        )
        if most is not None
    ]
    last, source = min(limits, default=(steps[-1], 0))
    return (last, source) if last < steps[-1] else None


def main_stage(config: Config) -> Stage:
    """The stage that sees the most tokens; a plan is made for it."""
    borders = [*stage_starts(config), config.training.num_steps]
    seen = [tokens_after(config, max(border, 0)) for border in borders]
    lengths = [end - start for start, end in itertools.pairwise(seen)]
    return config.data.stages[lengths.index(max(lengths))]


def last_stage_alike(config: Config, stage: Stage) -> Stage:
    """The last stage before rotary scaling changes: held-out rows have its length."""
    stages = config.data.stages
    following = stages[stages.index(stage) :]
    alike = itertools.takewhile(lambda s: s.rope_factor == stage.rope_factor, following)
    return list(alike)[-1]


def resolved(config: Config) -> Config:
    """The same run in plain stages and a number of steps."""
    scale = config.training.recipe_scale
    if scale != 1.0:
        config = _scaled(config, scale)
        training = config.training
        training = dataclasses.replace(
            training,
            num_steps=training.num_steps and max(1, round(training.num_steps * scale)),
            recipe_scale=1.0,
        )
        warmup = config.optimizer.warmup_steps
        optimizer = dataclasses.replace(
            config.optimizer, warmup_steps=warmup and round(warmup * scale)
        )
        config = dataclasses.replace(config, training=training, optimizer=optimizer)
    training = config.training
    starts = [0, *(stage.until_tokens or 0 for stage in config.data.stages)]
    stages = [
        plain
        for stage, start in zip(config.data.stages, starts, strict=False)
        for plain in _levels(config, stage, start)
    ]
    config = _with_stages(config, stages)
    if not training.num_steps:
        begin = stage_starts(config)[-1]
        steps = _steps(config, stages[-1], tokens_after(config, begin))
        training = dataclasses.replace(training, num_steps=begin + steps)
    stages[-1] = dataclasses.replace(stages[-1], until_tokens=None)
    return dataclasses.replace(_with_stages(config, stages), training=training)


def _with_stages(config: Config, stages: Sequence[Stage]) -> Config:
    data = dataclasses.replace(config.data, stages=tuple(stages))
    return dataclasses.replace(config, data=data)


def _scaled(value: Any, scale: float) -> Any:
    """The same with every end in tokens multiplied."""
    if isinstance(value, tuple):
        return tuple(_scaled(item, scale) for item in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    if isinstance(value, Phase | Stage):
        end = value.until_tokens
        return dataclasses.replace(value, until_tokens=end and max(1, round(end * scale)))
    fields = {f.name: _scaled(getattr(value, f.name), scale) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)


def is_ramp(stage: Stage) -> bool:
    """Whether it goes from other values to its own."""
    return stage.from_sequence_length is not None or stage.from_tokens_per_step is not None


def _levels(config: Config, stage: Stage, start: int) -> list[Stage]:
    """The plain stages of a ramp that starts after so many tokens; of others the stage itself.

    Level k of n stands k / (n - 1) of the way, for as long as the ramp is nearest to it. What
    divides the rows of both ends, as devices and streams must, divides those of all levels.
    """
    if not is_ramp(stage):
        return [stage]
    assert stage.until_tokens is not None
    last_length, last_tokens = stage.sequence_length, tokens_per_step(config, stage)
    length, tokens = (
        stage.from_sequence_length or last_length,
        stage.from_tokens_per_step or last_tokens,
    )
    of_length = math.gcd(RAMP_MULTIPLE, length, last_length)
    of_rows = math.gcd(tokens // length, last_tokens // last_length)
    levels: dict[tuple[int, int], int] = {}
    for k in range(stage.ramp_shapes):
        steps = stage.ramp_shapes - 1
        this_length = round((length + k * (last_length - length) / steps) / of_length) * of_length
        this_tokens = tokens + k * (last_tokens - tokens) // steps
        rows = max(1, this_tokens // this_length // of_rows) * of_rows
        until = min(1.0, (k + 0.5) / steps)
        progress = until**2 if stage.ramp == "sqrt" else until
        end = start + round(progress * (stage.until_tokens - start))
        # A level that comes again lasts longer.
        levels[this_length, rows * this_length] = max(end, 1)
    return [
        dataclasses.replace(
            stage,
            sequence_length=length,
            tokens_per_step=tokens,
            until_tokens=end,
            from_sequence_length=None,
            from_tokens_per_step=None,
        )
        for (length, tokens), end in levels.items()
    ]


def check_ends(place: str, ends: Sequence[int | None]) -> None:
    """Refuses ends in tokens that do not follow one another; the last may be None."""
    before = 0
    for i, end in enumerate(ends):
        if end is None:
            if i < len(ends) - 1:
                raise UserError(
                    f"{place}[{i}].until_tokens=None must be a number: {place}[{i + 1}] follows"
                )
        elif end <= before:
            what = f"that of {place}[{i - 1}], {before}" if i else "0"
            raise UserError(f"{place}[{i}].until_tokens={end} must be above {what}")
        else:
            before = end


def check_weights(place: str, weights: Sequence[float] | None, sources: int) -> None:
    """Refuses shares of the sources that are too many or too few, or no shares."""
    if weights is None:
        return
    if len(weights) != sources:
        raise UserError(
            f"{place}={weights} must be {sources}, one for each source of config.data.source"
        )
    if min(weights) < 0:
        raise UserError(f"{place}={weights} must be at least 0")
    if abs(sum(weights) - 1) >= 1e-6:
        text = f"{' + '.join(map(str, weights))} = {sum(weights):.6g}"
        raise UserError(f"{place}, {text}, must sum to 1")


def check_given(config: Config) -> None:
    """What a config file says of stages, before it is resolved.

    Raises:
      UserError: an end or a number that cannot be.
    """
    stages, steps = config.data.stages, config.training.num_steps
    for i, stage in enumerate(stages):
        place = f"config.data.stages[{i}]"
        for name, bound in (
            *(("sequence_length", 1), ("tokens_per_step", 1), ("micro_batches", 1)),
            *(("from_sequence_length", 1), ("from_tokens_per_step", 1), ("ramp_shapes", 2)),
            *(("rope_factor", 1), ("learning_rate_factor", 0)),
        ):
            value = getattr(stage, name)
            if value is not None and value < bound:
                raise UserError(f"{place}.{name}={value} must be at least {bound}")
        check_weights(f"{place}.weights", stage.weights, len(config.data.sources))
        if stage.ramp not in ("linear", "sqrt"):
            raise UserError(f"{place}.ramp={stage.ramp!r} must be one of linear, sqrt")
        if is_ramp(stage) and stage.until_tokens is None:
            raise UserError(f"{place}.until_tokens=None must be a number: a ramp has an end")
        length = stage.from_sequence_length or stage.sequence_length
        tokens = stage.from_tokens_per_step or tokens_per_step(config, stage)
        if is_ramp(stage) and tokens % length:
            raise UserError(
                f"the {tokens} tokens a step from which {place} ramps must be a multiple of the "
                f"length {length} from which it does"
            )
        rope: RopeConfig = config.model.rope
        if stage.rope_factor is not None and rope.scaling == "llama3":
            raise UserError(
                f"{place}.rope_factor={stage.rope_factor} is YaRN's, and config.model.rope.scaling="
                "'llama3' is another; set one of them"
            )
    check_ends("config.data.stages", [stage.until_tokens for stage in stages])
    place, end = f"config.data.stages[{len(stages) - 1}]", stages[-1].until_tokens
    if not steps and end is None:
        raise UserError(
            f"config.training.num_steps=0 ends the run with the last stage, so {place}."
            "until_tokens=None must be a number"
        )


def check(config: Config) -> None:
    """Whether the rows of every stage divide as they must, without a mesh.

    Raises:
      UserError: they do not, or are too long or too short for the model.
    """
    for i, stage in enumerate(config.data.stages):
        place, length = f"config.data.stages[{i}]", stage.sequence_length
        tokens, micro = tokens_per_step(config, stage), micro_batches(config, stage)
        model, streams = config.model, config.data.num_streams
        if length > model.max_position_embeddings:
            raise UserError(
                f"{place}.sequence_length={length} exceeds config.model.max_position_embeddings="
                f"{model.max_position_embeddings}"
            )
        if tokens % length:
            whose = place if stage.tokens_per_step else "config.training"
            raise UserError(
                f"{whose}.tokens_per_step={tokens} must be a multiple of {place}.sequence_length="
                f"{length}"
            )
        rows = tokens // length
        same = stage.micro_batches is None and micro == config.training.micro_batches
        whose = f"config.training.micro_batches={micro}" if same else f"its {micro} micro-batches"
        for number, name in ((streams, f"config.data.num_streams={streams}"), (micro, whose)):
            if rows % number:
                raise UserError(
                    f"the {rows} rows of {place} ({tokens} tokens / {length}) must be a multiple "
                    f"of {name}"
                )
        group = model.moe.capacity_group
        if model.moe.token_dropping != "none" and group and rows // micro % group:
            raise UserError(
                f"the {rows // micro} rows of a micro-batch in {place} must be a multiple of "
                f"config.model.moe.capacity_group={group}"
            )
        depth = model.num_nextn_predict_layers
        if depth >= length:
            raise UserError(
                f"config.model.num_nextn_predict_layers={depth} must be below {place}."
                f"sequence_length={length}"
            )
