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
from jax.sharding import Mesh, NamedSharding

from moe_jax import sharding, validation
from moe_jax.config import Config, UserError
from moe_jax.curriculum import stage_at
from moe_jax.data.corpus import Corpus, open_corpus, open_tokenizer, split_holdout
from moe_jax.data.loader import train_batches
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
from moe_jax.training import processes, resume, summary
from moe_jax.training.checkpoint import Checkpoints, check_writable
from moe_jax.training.display import Display
from moe_jax.training.evaluation import Evaluation
from moe_jax.training.lock import locked
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.self_check import check_exchange
from moe_jax.training.signals import Request, Requests
from moe_jax.training.step import Tree, first_state, init_state, make_train_step
from moe_jax.training.timing import Clock, CompiledByShape, Trace


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

        tokenizer = open_tokenizer(config.data)
        check_vocabulary(config, tokenizer)
        corpus = open_corpus(config.data)
        train_spans, held_out = split_holdout(corpus, config.data.holdout_every)
        check_data(config, corpus, len(train_spans))
        display.lines(summary.data(config, corpus, train_spans))

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
        first_step, data_state, state = start(config, mesh, checkpoints, corpus, display)
        count = count_parameters(state["parameters"], state["router_bias"], config.model)
        display.line(summary.model(count))

        batches = stack.enter_context(
            contextlib.closing(train_batches(config, corpus, train_spans, share, data_state))
        )

        def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            return global_batch(batch, mesh, share)

        writer = None
        if is_main:
            text = json.dumps(to_dict(config), indent=2)
            (workdir / "config.json").write_text(text + "\n")
            tokenizer.save(workdir / TOKENIZER)
            writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, first_step)))
        train_step = CompiledByShape(make_train_step(config))
        evaluate = Evaluation(config, corpus, held_out, share, place)
        if held_out:
            display.line(summary.held_out(len(held_out), evaluate.token_entropy()))
        trace = Trace(validation.profile_steps(config), workdir / "profile")
        stack.callback(trace.stop)
        clock = Clock(training.tokens_per_step)
        request = Request.NOTHING
        exact = 0  # products that fell back from eight bits

        with Requests(workdir, config.checkpoint.every_minutes, display.line) as requests:
            for step in range(first_step + 1, last_step + 1):
                batch = place(next(batches))
                values = scheduled(config, step - 1)
                if train_step.compile(state, batch, values):
                    _, rows, length = batch["tokens"].shape
                    memory = train_step.bytes_per_device(batch)
                    display.line(summary.compiled(rows, length, train_step.seconds, memory))
                    clock.start(step - 1)
                trace.before(step)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = train_step(state, batch, values)
                metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
                trace.after(step)

                request = requests.settled()
                is_last = step == last_step or request.stops
                if step % training.log_every_steps == 0 or step == first_step + 1 or is_last:
                    length = stage_at(config, step - 1).sequence_length
                    speed = clock.tokens_per_second(step)
                    mfu = speed * training_operations(config.model, count, length) / peak
                    left = (training.num_steps - step) * training.tokens_per_step / speed
                    row = {
                        "step": step,
                        "tokens": step * training.tokens_per_step,
                        **metrics,
                        **{name: values[name] for name in changing(config)},
                        "sequence_length": length,
                        "tokens_per_second": speed,
                        "mfu": mfu,
                        "checkpoint_stall_seconds": checkpoints.stall_seconds(),
                    }
                    if writer:
                        writer.write(row)
                    if metrics["skipped_updates"]:
                        display.line(summary.skipped(metrics))
                    if metrics.get("fp8_exact", 0) > exact:
                        exact = metrics["fp8_exact"]
                        display.line(summary.fell_back(metrics, config.precision.fp8_error_bound))
                    display.line(summary.step(step, metrics["loss"], speed, mfu, left))
                    display.progress(step, metrics["loss"], speed, mfu, left)
                    checkpoints.tell()
                loss = None
                if step % training.eval_every_steps == 0 or is_last:
                    with clock.paused():
                        loss = evaluate(state)
                    if loss is not None:
                        display.line(f"step {step:>6}  held-out loss {loss:.4f}")
                        if writer:
                            writer.write({"step": step, "eval_loss": loss})
                if step % config.checkpoint.every_steps == 0 or is_last or request is Request.SAVE:
                    with clock.paused():
                        document = resume.describe(config, corpus.fingerprint, batches.get_state())
                        checkpoints.save(step, state, document | {"eval_loss": loss})
                        requests.saved()
                if is_last:
                    break

        checkpoints.wait()
        display.lines(summary.ending(config, workdir, request))
        if training.sample_tokens and not request.stops:
            display.line(summary.sample(sample_text(config, tokenizer, state, mesh)))
        return request.exit_code


def start(
    config: Config, mesh: Mesh, checkpoints: Checkpoints, corpus: Corpus, display: Display
) -> tuple[int, dict[str, Any] | None, Tree]:
    """The step to go on from, the data's state there (None: at the beginning), and the state."""
    init = jax.jit(lambda: init_state(config))
    step, source = checkpoints.latest(), config.training.init_from
    if step is None:
        if source is None:
            return 0, None, init()
        weights = load_weights(source, config.model, mesh)
        display.line(f"weights     of {source}")
        display.lines([f"            {text}" for text in weights.notes])
        # Donated: two copies of a large model need not fit.
        make = jax.jit(functools.partial(first_state, config), donate_argnums=(0, 1))
        return 0, None, make(weights.parameters, weights.router_bias)
    document = checkpoints.document(step)
    place = f"checkpoint {step} in {checkpoints.directory}"
    changed = resume.check(document, config, corpus.fingerprint, place)
    display.line(f"resuming    from step {step}")
    display.lines([f"changed     {text}" for text in changed])
    return step, document["data"], checkpoints.restore(step, abstract_state(init, mesh))


def abstract_state(init: Any, mesh: Mesh) -> Tree:
    """Shapes, dtypes and shardings of what `init` makes, without making it."""

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A value that no axis splits has no sharding of its own here.
        spec = x.sharding.spec if x.sharding else sharding.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(init))


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


def check_vocabulary(config: Config, tokenizer: TrainingTokenizer) -> None:
    """Refuses token ids that the model lacks."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={config.model.vocab_size} must be at least the tokenizer's "
            f"{tokenizer.vocab_size}"
        )


def check_data(config: Config, corpus: Corpus, train_spans: int) -> None:
    """Refuses a corpus that leaves nothing to train on."""
    if not train_spans:
        raise UserError(
            f"config.data.source={config.data.source!r} has {len(corpus.lengths)} documents, and "
            f"config.data.holdout_every={config.data.holdout_every} leaves none for training"
        )
