"""A training run, from top to bottom."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax import sharding, validation
from moe_jax.config import Config, UserError, to_dict
from moe_jax.data.corpus import Corpus, Span, open_corpus, split_holdout
from moe_jax.data.curriculum import stage_at
from moe_jax.data.loader import train_batches
from moe_jax.data.tokenizer import BOUNDARY, ByteTokenizer
from moe_jax.inference.decoding import sample
from moe_jax.planning.machine import peak_operations
from moe_jax.planning.operations import count_parameters, training_operations
from moe_jax.training import resume
from moe_jax.training.checkpoint import Checkpoints, check_writable
from moe_jax.training.display import Display, format_bytes, format_count, format_duration
from moe_jax.training.evaluation import Evaluation
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.step import init_state, make_logits, make_train_step
from moe_jax.training.timing import Clock, CompiledByShape


def train(config: Config, workdir: Path, lines: Sequence[str] = ()) -> None:
    """Trains until the config's last step, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: checked by `validation.parse`.
      workdir: takes checkpoints, metrics and the config.
      lines: for a person, to be shown first.
    Raises:
      ValueError: a user's mistake, found before anything is compiled or written.
    """
    mesh = sharding.make_mesh(config.mesh)
    validation.check_mesh(config, dict(mesh.shape))
    corpus = open_corpus(config.data)
    check_tokens(config, corpus)
    check_writable(workdir)
    peak = peak_operations(jax.devices(), jnp.dtype(config.precision.compute_dtype))
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    try:
        with jax.set_mesh(mesh):
            Run(config, workdir, mesh, corpus, checkpoints, peak, lines).train()
    finally:
        checkpoints.close()


class Run:
    """What a run holds while it goes: the state, the batches, and where it writes."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: Mesh,
        corpus: Corpus,
        checkpoints: Checkpoints,
        peak: tuple[float, str],
        lines: Sequence[str],
    ):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.corpus, self.checkpoints = corpus, checkpoints
        self.is_main = jax.process_index() == 0
        self.last_step = config.training.stop_after_step or config.training.num_steps
        self.share = sharding.process_share(mesh)
        train_spans, self.held_out = split_holdout(corpus, config.data.holdout_every)

        init = jax.jit(lambda: init_state(config))
        self.first_step, data_state, changed = self._find_checkpoint()
        if data_state is None:
            self.state = init()
        else:
            self.state = checkpoints.restore(self.first_step, abstract_state(init, mesh))
        self.batches = train_batches(config, corpus, train_spans, self.share, data_state)
        self.display = Display(config.training.num_steps, self.is_main)
        for text in lines:
            self.display.line(text)
        self.peak, peak_source = peak
        self._introduce(train_spans, peak_source, changed)

    def _find_checkpoint(self) -> tuple[int, dict[str, Any] | None, list[str]]:
        step = self.checkpoints.latest()
        if step is None:
            return 0, None, []
        document = self.checkpoints.document(step)
        place = f"checkpoint {step} in {self.checkpoints.directory}"
        changed = resume.check(document, self.config, self.corpus.fingerprint, place)
        return step, document["data"], changed

    def train(self) -> None:
        """Steps, with what happens between them."""
        config = self.config
        if self.first_step >= self.last_step:
            self.display.line(f"step {self.first_step} is reached already; nothing to train")
            self._finish()
            return
        writer = MetricsWriter(self.workdir, self.first_step) if self.is_main else None
        train_step = CompiledByShape(make_train_step(config))
        evaluate = Evaluation(config, self.corpus, self.held_out, self.share, self._place)
        clock = Clock(config.training.tokens_per_step)
        profiled = validation.profile_steps(config)
        try:
            for step in range(self.first_step + 1, self.last_step + 1):
                batch = self._place(next(self.batches))
                if train_step.compile(self.state, batch):
                    self._tell_compiled(train_step, batch)
                    clock.start(step - 1)
                if step == profiled.start and profiled:
                    jax.profiler.start_trace(str(self.workdir / "profile"))
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    self.state, metrics = train_step(self.state, batch)
                if profiled and step == min(profiled.stop - 1, self.last_step):
                    jax.block_until_ready(self.state)
                    jax.profiler.stop_trace()
                is_last = step == self.last_step
                if step % config.training.log_every_steps == 0 or is_last or step == 1:
                    self._log(step, jax.device_get(metrics), clock, writer)
                if step % config.training.eval_every_steps == 0 or is_last:
                    with clock.paused(self.state):
                        loss = evaluate(self.state)
                    if loss is not None:
                        self.display.line(f"step {step:>6}  held-out loss {loss:.4f}")
                    if writer and loss is not None:
                        writer.write({"step": step, "eval_loss": loss})
                if step % config.checkpoint.every_steps == 0 or is_last:
                    with clock.paused(self.state):
                        self._save(step)
            self.checkpoints.wait()
            self._finish()
        finally:
            self.batches.close()
            self.display.close()
            if writer:
                writer.close()

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as its part of the global batch."""
        by_rows = sharding.batch_sharding(self.mesh)
        first, last, count = self.share
        micro_batches, rows, length = batch["tokens"].shape
        shape = (micro_batches, rows * count // (last - first), length)
        return {
            name: jax.make_array_from_process_local_data(by_rows, array, shape)
            for name, array in batch.items()
        }

    def _log(
        self, step: int, metrics: dict[str, Any], clock: Clock, writer: MetricsWriter | None
    ) -> None:
        config = self.config
        length = stage_at(config, step - 1).sequence_length
        speed = clock.tokens_per_second(step)
        mfu = speed * training_operations(config.model, self.active, length) / self.peak
        row = {
            "step": step,
            "tokens": step * config.training.tokens_per_step,
            **{name: value.item() for name, value in metrics.items()},
            "sequence_length": length,
            "tokens_per_second": speed,
            "mfu": mfu,
        }
        if writer:
            writer.write(row)
        left = (config.training.num_steps - step) * config.training.tokens_per_step / speed
        if row["skipped_updates"]:
            self.display.line(f"{row['skipped_updates']} updates skipped: loss was not finite")
        self.display.line(
            f"step {step:>6}  loss {row['loss']:.4f}  {format_count(speed):>6} tokens/s  "
            f"MFU {mfu:5.1%}  {format_duration(left)} left"
        )
        self.display.progress(step, row["loss"], speed, mfu, left)

    def _save(self, step: int) -> None:
        document = resume.describe(self.config, self.corpus.fingerprint, self.batches.get_state())
        self.checkpoints.save(step, self.state, document)

    def _introduce(self, train_spans: list[Span], peak_source: str, changed: list[str]) -> None:
        config, line = self.config, self.display.line
        devices = list(self.mesh.devices.flat)
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        line(f"devices     {len(devices)} x {devices[0].device_kind}; mesh {sizes or 'of one'}")
        line(f"peak        {self.peak / 1e12:.3g} TFLOP/s ({peak_source})")
        total, self.active = count_parameters(
            self.state["parameters"], self.state["router_bias"], config.model
        )
        line(f"parameters  {format_count(total)} in total, {format_count(self.active)} per token")
        skipped = ", ".join(f"{count} {why}" for why, count in self.corpus.skipped.items())
        positions = sum(span.stop - span.start for span in train_spans)
        longest = max(stage.sequence_length for stage in config.data.stages)
        cut = sum(span.stop - span.start > longest for span in train_spans)
        line(
            f"data        {config.data.source}: {len(self.corpus)} documents, "
            f"{format_count(positions)} tokens, {cut} cut to rows"
            + (f"; skipped: {skipped}" if skipped else "")
        )
        line(
            f"batch       {format_count(config.training.tokens_per_step)} tokens a step, "
            f"{config.training.num_steps} steps, "
            f"{config.training.num_steps * config.training.tokens_per_step / positions:.2f} epochs"
        )
        line(f"workdir     {self.workdir}")
        if self.first_step:
            line(f"resuming    from step {self.first_step}")
        for text in changed:
            line(f"changed     {text}")
        if self.is_main:
            text = json.dumps(to_dict(config), indent=2)
            (self.workdir / "config.json").write_text(text + "\n")

    def _tell_compiled(self, train_step: CompiledByShape, batch: dict[str, jax.Array]) -> None:
        rows, length = batch["tokens"].shape[1:]
        memory = train_step.bytes_per_device(batch)
        self.display.line(
            f"compiled    {rows} rows of {length} in {format_duration(train_step.seconds)}; "
            f"{format_bytes(memory)} per device"
        )

    def _finish(self) -> None:
        line = self.display.line
        line(f"metrics     {self.workdir / 'metrics.jsonl'}, {self.workdir / 'tensorboard'}")
        line(f"checkpoints {self.checkpoints.directory}")
        if self.last_step < self.config.training.num_steps:
            line("stopped     the same command without stop_after_step goes on from here")
        if self.config.training.sample_tokens:
            line("sample      " + self._sample().replace("\n", "\n            "))

    def _sample(self) -> str:
        tokenizer = ByteTokenizer()
        prompt = tokenizer.encode(self.config.training.sample_prompt)
        rows = sample(
            make_logits(self.config),
            self.state,
            np.concatenate([[BOUNDARY], prompt]).astype(np.int32),
            num_tokens=self.config.training.sample_tokens,
            mesh=self.mesh,
            seed=self.config.seed,
        )
        return tokenizer.decode(rows[0])


def abstract_state(init: Callable[[], Any], mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of what `init` makes, without making it."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
        ),
        jax.eval_shape(init),
    )


def check_tokens(config: Config, corpus: Corpus) -> None:
    """Raises ValueError if the tokenizer's ids exceed the model's, or nothing is left to train."""
    size = ByteTokenizer.vocab_size
    if size > config.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={config.model.vocab_size} must be at least the tokenizer's "
            f"{size}"
        )
    if not split_holdout(corpus, config.data.holdout_every)[0]:
        raise UserError(
            f"config.data.source={config.data.source!r} has {len(corpus)} documents, and "
            f"config.data.holdout_every={config.data.holdout_every} leaves none for training"
        )
