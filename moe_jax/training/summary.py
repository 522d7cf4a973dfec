"""What a person is told before and after training, as lines."""

from collections.abc import Sequence
from pathlib import Path

import jax

from moe_jax import sharding
from moe_jax.config import Config, Stage
from moe_jax.curriculum import drawn_after, tokens_after
from moe_jax.data.corpus import Corpus, Span
from moe_jax.ops import fp8_native
from moe_jax.ops.fp8_recipes import RECIPES
from moe_jax.planning.operations import Parameters
from moe_jax.training.signals import RESTART, Request
from moe_jax.units import format_bytes, format_count, format_duration

# fp8_block's in the model of `benchmarks.fp8_parity`. No other platform has been measured.
PORTABLE_COST = "on a CPU a step takes 1.4 times bfloat16's"


def machine(mesh: jax.sharding.Mesh, peak: float, peak_source: str) -> list[str]:
    devices = list(mesh.devices.flat)
    sizes = _sizes(dict(mesh.shape))
    lines = [f"devices     {mesh.size} x {devices[0].device_kind}; mesh {sizes or 'of one'}"]
    islands = sharding.num_islands(devices)
    if islands > 1:
        slow = sharding.slow_parts(dict(mesh.shape), islands)
        lines.append(f"links       {islands} slices or hosts; between them {_sizes(slow)}")
        crossing = [axis for axis in sharding.FAST_AXES if slow[axis] > 1]
        if crossing:
            lines.append(
                f"            {' and '.join(crossing)} cross slow links: data, fsdp or "
                "expert_outer had better be cut there"
            )
    return [
        *lines,
        f"peak        {peak / 1e12:.3g} TFLOP/s ({peak_source})",
    ]


def _sizes(axes: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1)


def model(count: Parameters) -> str:
    text = f"{format_count(count.total)} in total, {format_count(count.active)} per token"
    ahead = f"; {format_count(count.mtp)} to predict ahead" if count.mtp else ""
    return f"parameters  {text}{ahead}"


def recipe(config: Config) -> list[str]:
    """Of products in eight bits, for the current mesh."""
    name, form = config.precision.recipe, config.precision.fp8_form
    if name == "none":
        return []
    reason = fp8_native.why_portable(form, RECIPES[name])
    if reason is None:
        return [f"recipe      {name}, by the devices' own products in eight bits where dims allow"]
    return [
        f"recipe      {name}, portable: {reason}",
        "            operands are rounded and products are wide, which is slower than",
        f"            recipe='none': {PORTABLE_COST}",
    ]


def data(config: Config, corpus: Corpus, groups: Sequence[Sequence[Span]]) -> list[str]:
    spans = [span for of_source in groups for span in of_source]
    tokens = sum(span.stop - span.start for span in spans)
    longest = max(stage.sequence_length for stage in config.data.stages)
    cut = sum(span.stop - span.start > longest for span in spans)
    skipped = ", ".join(f"{count} {reason}" for reason, count in corpus.skipped.items())
    training, sources = config.training, config.data.sources
    wanted = tokens_after(config, training.num_steps)
    name = sources[0].path if len(sources) == 1 else f"{len(sources)} sources"
    lines = [
        f"data        {name}: {len(corpus.lengths)} documents"
        + (f" (skipped: {skipped})" if skipped else ""),
        f"            {format_count(tokens)} tokens to train on, {cut} documents longer than a row",
    ]
    if len(sources) == 1:
        epochs = f", {wanted / tokens:.2f} epochs"
    else:
        epochs = ""
        for i, (source, of_source) in enumerate(zip(sources, groups, strict=True)):
            size = sum(span.stop - span.start for span in of_source)
            drawn = drawn_after(config, training.num_steps, i)
            lines.append(
                f"            {drawn / wanted:.1%} {source.path}: {format_count(size)} tokens, "
                f"{drawn / size:.2f} epochs"
            )
    return [
        *lines,
        f"batch       {format_count(tokens_after(config, 1))} tokens a step, "
        f"{training.num_steps} steps{epochs}",
    ]


def dry(config: Config, step: int, source: int) -> str:
    name, epochs = config.data.sources[source].path, config.data.sources[source].epochs
    return (
        f"dry         {name} is drawn {epochs:g} times by step {step} of "
        f"{config.training.num_steps}: the run ends there"
    )


def drawn(step: int, config: Config, tokens: Sequence[int], epoch: Sequence[int]) -> str:
    total = max(sum(tokens), 1)  # nothing while the first group of rows is handed out
    parts = [
        f"{share / total:.1%} {source.path} ({share / size:.2f} epochs)"
        for source, share, size in zip(config.data.sources, tokens, epoch, strict=True)
    ]
    return f"step {step:>6}  drawn {', '.join(parts)}"


def drawn_row(tokens: Sequence[int], epoch: Sequence[int]) -> dict[str, float]:
    """What was drawn of each source, for the record: by its place in the config."""
    return {
        name: value
        for i, (share, size) in enumerate(zip(tokens, epoch, strict=True))
        for name, value in ((f"drawn_tokens/{i}", share), (f"drawn_epochs/{i}", share / size))
    }


def held_out(spans: int, token_entropy: float) -> str:
    return f"held out    {spans} documents; single tokens have {token_entropy:.2f} nats"


def stage(number: int, rows: int, this: Stage, seconds: float, bytes_per_device: int) -> str:
    """At its first step; what it has of its own besides its shape stands at the end."""
    own = []
    if this.weights is not None:
        own.append(f"sources {', '.join(f'{weight:.1%}' for weight in this.weights)}")
    if this.mask_documents is not None:
        own.append(f"documents {'apart' if this.mask_documents else 'see each other'}")
    if this.rope_factor is not None:
        own.append(f"YaRN's factor {this.rope_factor:g}")
    if this.learning_rate_factor != 1:
        own.append(f"learning rate times {this.learning_rate_factor:g}")
    return "; ".join(
        [
            f"stage {number:<5} {rows} rows of {this.sequence_length} tokens, compiled in "
            f"{format_duration(seconds)}, {format_bytes(bytes_per_device)} per device",
            *own,
        ]
    )


def step(number: int, loss: float, speed: float, mfu: float, seconds_left: float) -> str:
    return (
        f"step {number:>6}  loss {loss:.4f}  {format_count(speed):>6} tokens/s  "
        f"MFU {mfu:5.1%}  {format_duration(seconds_left)} left"
    )


def fell_back(metrics: dict[str, float], bound: float) -> str:
    """Once more products take their operands as they are."""
    suffix = "_error"
    worst = max((name for name in metrics if name.endswith(suffix)), key=lambda n: metrics[n])
    where = worst.removeprefix("fp8/").removesuffix(suffix)
    return (
        f"{metrics['fp8_exact']:.0f} products are no longer in eight bits: an operand erred by "
        f"more than fp8_error_bound={bound}; now the worst is {where} with {metrics[worst]:.3g}"
    )


def ending(config: Config, workdir: Path, request: Request = Request.NOTHING) -> list[str]:
    lines = [f"written     {workdir}: checkpoints, metrics.jsonl, tensorboard, config.json"]
    stop = config.training.stop_after_step
    if request is Request.PREEMPT:
        lines.append(f"preempted   exit code {RESTART}: the same command goes on from here")
    elif request is Request.STOP:
        lines.append("interrupted the same command goes on from here")
    elif stop is not None and stop < config.training.num_steps:
        lines.append("stopped     the same command without stop_after_step goes on from here")
    return lines


def sample(text: str) -> str:
    return "sample      " + text.replace("\n", "\n            ")
