"""Held-out loss."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config, Stage
from moe_jax.curriculum import at_stage, last_stage_alike
from moe_jax.data.corpus import Corpus, Span
from moe_jax.data.loader import Batch, eval_batches
from moe_jax.training.step import batch_shape, make_eval_step

Place = Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]


class Evaluation:
    """The mean loss over the same held-out rows each time.

    They are as long as in the last stage with the rotary scaling of the one that is trained.

    Args:
      held_out: spans of the corpus.
      share: this process's part of the rows, as the loader takes it.
      place: makes global arrays of this process's rows.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        held_out: Sequence[Span],
        share: tuple[int, int, int],
        place: Place,
    ):
        self._config, self._place = config, place
        self._of_stage = functools.partial(eval_batches, config, corpus, held_out, share=share)
        self._made: dict[Stage, tuple[Any, list[Batch]]] = {}

    def _at(self, stage: Stage) -> tuple[Any, list[Batch]]:
        """The compiled function and the batches for this stage."""
        stage = last_stage_alike(self._config, stage)
        if stage not in self._made:
            _, rows, length = batch_shape(self._config, stage)
            step = jax.jit(make_eval_step(at_stage(self._config, stage)))
            self._made = {stage: (step, self._of_stage(length=length, rows=rows))}
        return self._made[stage]

    def token_entropy(self, stage: Stage) -> float:
        """Nats per token of a model that knows how often each token occurs in these rows, no more.

        Of this process's rows; nan if nothing is held out.
        """
        counts = np.zeros(1)
        for batch in self._at(stage)[1]:
            seen = np.bincount(batch["targets"][batch["loss_weights"] > 0])
            counts = np.pad(counts, (0, max(0, len(seen) - len(counts))))
            counts[: len(seen)] += seen
        shares = counts[counts > 0] / counts.sum()
        return float(-np.sum(shares * np.log(shares))) if len(shares) else float("nan")

    def __call__(self, state: Any, stage: Stage) -> float | None:
        """Nats per token; None if nothing is held out."""
        step, batches = self._at(stage)
        sums = [step(state, self._place(batch)) for batch in batches]
        if not sums:
            return None
        losses, weights = zip(*jax.device_get(sums), strict=True)
        return float(sum(losses) / sum(weights))
