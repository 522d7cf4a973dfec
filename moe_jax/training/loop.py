"""A training run, from top to bottom."""

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import sharding, validation
from moe_jax.config import Config, UserError
from moe_jax.curriculum import (
    at_stage,
    num_rows,
    stage_at,
    stage_starts,
    steps_until_dry,
    tokens_after,
    tokens_per_step,
)
from moe_jax.data.corpus import Corpus, Span, split_holdout
from moe_jax.data.loader import train_batches
from moe_jax.data.packing import tokens_drawn
from moe_jax.data.sources import open_corpus
from moe_jax.data.tokenizer import TrainingTokenizer
from moe_jax.fields import to_dict
from moe_jax.inference.generation import Generator
from moe_jax.inference.sampling import Sampling
from moe_jax.interop.orbax_files import TOKENIZER
from moe_jax.interop.weights import load_weights
from moe_jax.models.language_model import LanguageModel
from moe_jax.planning.machines import peak_operations
from moe_jax.planning.operations import count_parameters, training_operations
from moe_jax.schedules import changing, scheduled
from moe_jax.training import debug, processes, resume, summary
from moe_jax.training.checkpoint import Checkpoints, check_writable
from moe_jax.training.collapse import ExpertWatch
from moe_jax.training.display import Display
from moe_jax.training.evaluation import Evaluation
from moe_jax.training.lock import locked
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.recovery import Guard
from moe_jax.training.self_check import check_exchange
from moe_jax.training.signals import Request, Requests
from moe_jax.training.step import (
    Tree,
    abstract_state,
    first_state,
    init_state,
    make_train_step,
)
from moe_jax.training.timing import Clock, CompiledSteps, Trace
from moe_jax.training.watchdog import watchdog


def train(config: Config, workdir: Path, lines: Sequence[str] = ()) -> int:
    """Trains until the config's last step, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: checked by `validation.parse`.
      workdir: takes checkpoints, metrics and the config.
      lines: for a person, to be shown first.
    Returns:
      The exit code that the end asks for: 0, or 75 where the run made room and is to be restarted.
    Raises:
      UserError: found before anything is compiled; what was saved stays as it is.
    """
    training, is_main = config.training, jax.process_index() == 0
    last_step = training.stop_after_step or training.num_steps
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(
            contextlib.closing(Display(training.num_steps, enabled=is_main))
        )
        display.lines(lines)
        mesh = sharding.make_mesh(config.mesh)
        validation.check_mesh(config, dict(mesh.shape), mesh.devices.flat[0].platform)
        share = sharding.process_share(mesh)
        peak, peak_source = peak_operations(
            list(mesh.devices.flat), jnp.dtype(config.precision.compute_dtype)
        )
        display.lines(summary.machine(mesh, peak, peak_source))

        corpus = open_corpus(config.data, config.model.vocab_size)
        tokenizer = corpus.tokenizer
        groups, held_out = split_holdout(corpus.parts, config.data.holdout_every)
        check_data(config, corpus.parts, groups)
        epoch = [sum(span.stop - span.start for span in spans) for spans in groups]
        display.lines(summary.data(config, corpus, groups))
        if dry := steps_until_dry(config, epoch):
            last_step = min(last_step, dry[0])
            display.line(summary.dry(config, *dry))

        if is_main:
            stack.callback(remove_empty, workdir / "checkpoints", workdir)
        processes.all_or_none(lambda: check_writable(workdir))
        processes.all_or_none(lambda: stack.enter_context(locked(workdir)) if is_main else None)
        checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(workdir / "checkpoints", config.checkpoint, display.line)
            )
        )
        stack.enter_context(jax.set_mesh(mesh))
        display.lines(check_exchange(config))
        display.lines(summary.recipe(config))
        first_step, saved, state = start(config, mesh, checkpoints, corpus, display)
        count = count_parameters(state["parameters"], state["router_bias"], config.model)
        display.line(summary.model(count))

        batches = stack.enter_context(
            contextlib.closing(train_batches(config, corpus, groups, share, saved.get("data")))
        )

        def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            return global_batch(batch, mesh, share)

        writer = None
        if is_main:
            text = json.dumps(to_dict(config), indent=2)
            (workdir / "config.json").write_text(text + "\n")
            tokenizer.save(workdir / TOKENIZER)
            writer = MetricsWriter(workdir, first_step, display.line)
            stack.callback(writer.close)
        steps = stack.enter_context(contextlib.closing(CompiledSteps(config, mesh, state)))
        evaluate = Evaluation(config, corpus, held_out, share, place)
        if held_out:
            entropy = evaluate.token_entropy(stage_at(config, first_step))
            display.line(summary.held_out(len(held_out), entropy))
        trace = Trace(validation.profile_steps(config), workdir / "profile")
        stack.callback(trace.stop)
        clock, starts = Clock(), stage_starts(config)
        stage, end = stage_at(config, first_step), tokens_after(config, training.num_steps)
        guard = Guard(config.recovery, checkpoints, display.line, saved.get("guard"))
        experts = ExpertWatch(config.collapse)
        dog = stack.enter_context(watchdog(config.recovery.watchdog_minutes))
        request = Request.NOTHING
        exact = 0  # products that fell back from eight bits

        with Requests(workdir, config.checkpoint.every_minutes, display.line) as requests:
            for step in range(first_step + 1, last_step + 1):
                if step - 1 in starts or step - 1 == first_step:
                    stage = stage_at(config, step - 1)
                    train_step = steps.wait(stage)
                    make = functools.partial(make_train_step, at_stage(config, stage))
                    checked_step = debug.checked(config.debug, train_step.call, make)
                    rows, length = num_rows(config, stage), stage.sequence_length
                    number = sum(start < step for start in starts)
                    display.line(summary.stage(number, rows, stage, *train_step[1:]))
                    # The next that is another is compiled while this one trains.
                    following = [stage_at(config, s) for s in starts if step <= s < last_step]
                    any(steps.start(each) for each in following)
                    steps.keep([stage, *following])
                    clock.start(tokens_after(config, step - 1))
                with clock.waiting():
                    batch = next(batches)
                batch, values = place(batch), scheduled(config, step - 1)
                trace.before(step)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = checked_step(step, state, batch, values)
                metrics = jax.device_get(metrics)
                trace.after(step)
                dog.progress()
                for warning in experts.look(metrics):
                    display.line(f"experts     step {step}: {warning}")
                metrics = {name: x.item() for name, x in metrics.items() if x.ndim == 0}
                state = guard.mended(step, metrics, state, batch)

                request = requests.settled()
                is_last = step == last_step or request.stops
                if step % training.log_every_steps == 0 or step == first_step + 1 or is_last:
                    tokens = tokens_after(config, step)
                    speed, waited = clock.look(tokens)
                    mfu = speed * training_operations(config.model, count, length) / peak
                    left = (end - tokens) / speed
                    row = {
                        "step": step,
                        "tokens": tokens,
                        **metrics,
                        **{name: values[name] for name in changing(config)},
                        "sequence_length": length,
                        "tokens_per_step": tokens_per_step(config, stage),
                        "tokens_per_second": speed,
                        "data_wait_fraction": waited,
                        "mfu": mfu,
                        "checkpoint_stall_seconds": checkpoints.stall_seconds(),
                    }
                    if writer:
                        writer.write(row)
                    if metrics.get("fp8_exact", 0) > exact:
                        exact = metrics["fp8_exact"]
                        display.line(summary.fell_back(metrics, config.precision.fp8_error_bound))
                    display.line(summary.step(step, metrics["loss"], speed, mfu, left))
                    display.progress(step, metrics["loss"], speed, mfu, left)
                    checkpoints.tell()
                loss = None
                if step % training.eval_every_steps == 0 or is_last:
                    with clock.paused():
                        loss = evaluate(state, stage)
                    if loss is not None:
                        display.line(f"step {step:>6}  held-out loss {loss:.4f}")
                        if writer:
                            writer.write({"step": step, "eval_loss": loss})
                is_due = step % config.checkpoint.every_steps == 0 and not guard.bad
                if is_due or is_last or request is Request.SAVE:
                    with clock.paused():
                        now = at_stage(config, stage)
                        document = resume.describe(now, corpus.fingerprint, batches.get_state())
                        document |= {"guard": guard.state(), "eval_loss": loss}
                        checkpoints.save(step, state, document)
                        requests.saved()
                    if len(groups) > 1:
                        drawn = tokens_drawn(document["data"]["streams"].values())
                        display.line(summary.drawn(step, config, drawn, epoch))
                        if writer:
                            writer.write({"step": step, **summary.drawn_row(drawn, epoch)})
                if is_last:
                    break

        checkpoints.wait()
        display.lines(summary.ending(config, workdir, request))
        if training.sample_tokens and not request.stops:
            now = at_stage(config, stage_at(config, last_step - 1))
            display.line(summary.sample(sample_text(now, tokenizer, state, mesh)))
        return request.exit_code


def start(
    config: Config, mesh: Mesh, checkpoints: Checkpoints, corpus: Corpus, display: Display
) -> tuple[int, dict[str, Any], Tree]:
    """The step to go on from, what was saved beside the state there, and the state."""
    init = jax.jit(lambda: init_state(config))
    step, source = checkpoints.latest(), config.training.init_from
    if step is None:
        if source is None:
            return 0, {}, init()
        weights = load_weights(source, config.model, mesh)
        display.line(f"weights     of {source}")
        display.lines([f"            {text}" for text in weights.notes])
        # Donated: two copies of a large model need not fit.
        make = jax.jit(functools.partial(first_state, config), donate_argnums=(0, 1))
        return 0, {}, make(weights.parameters, weights.router_bias)
    document = checkpoints.document(step)
    place = f"checkpoint {step} in {checkpoints.directory}"
    # What was saved has the rotary scaling of its stage.
    there = at_stage(config, stage_at(config, step - 1))
    changed = resume.check(document, there, corpus.fingerprint, place)
    display.line(f"resuming    from step {step}")
    display.lines([f"changed     {text}" for text in changed])
    return step, document, checkpoints.restore(step, abstract_state(config, mesh))


def remove_empty(*folders: Path) -> None:
    """A run that was refused leaves nothing behind."""
    for folder in folders:
        with contextlib.suppress(OSError):  # it holds something, or was never made
            folder.rmdir()


def global_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, share: tuple[int, int, int]
) -> dict[str, jax.Array]:
    """The global batch [micro_batches, rows, length], of which `batch` is this process's share."""
    first, last, count = share
    micro_batches, rows, length = batch["tokens"].shape
    shape = (micro_batches, rows * count // (last - first), length)
    return {
        name: jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), array, shape)
        for name, array in batch.items()
    }


def sample_text(config: Config, tokenizer: TrainingTokenizer, state: Tree, mesh: Mesh) -> str:
    """What the model makes of the config's prompt."""
    training = config.training
    model = LanguageModel(
        config.model, config.precision, mesh, state["parameters"], state["router_bias"]
    )
    (ids,) = tokenizer.encode([training.sample_prompt.encode()])
    prompt = np.concatenate([[tokenizer.boundary], ids], dtype=np.int32)
    slots = len(prompt) + training.sample_tokens
    generator = Generator(model, slots=slots, sampling=Sampling(temperature=0.7))
    (tokens,) = generator([prompt], training.sample_tokens, config.seed)
    return tokenizer.decode([*prompt, *tokens])


def check_data(config: Config, parts: Sequence[Corpus], groups: Sequence[Sequence[Span]]) -> None:
    """Refuses a source that leaves nothing to train on."""
    for source, part, spans in zip(config.data.sources, parts, groups, strict=True):
        if not spans:
            raise UserError(
                f"config.data.source={source.path!r} has {len(part.lengths)} documents, and "
                f"config.data.holdout_every={config.data.holdout_every} leaves none for training"
            )
