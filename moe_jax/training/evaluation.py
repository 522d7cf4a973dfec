"""Held-out loss."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config
from moe_jax.curriculum import num_rows
from moe_jax.data.corpus import Corpus, Span
from moe_jax.data.loader import eval_batches
from moe_jax.training.step import make_eval_step

Place = Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]


class Evaluation:
    """The mean loss over the same held-out rows each time, at the length of the last stage.

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
        stage = config.data.stages[-1]
        rows = num_rows(config, stage) // config.training.micro_batches
        self._batches = eval_batches(config, corpus, held_out, stage.sequence_length, rows, share)
        self._place = place
        self._step = jax.jit(make_eval_step(config))

    def token_entropy(self) -> float:
        """Nats per token of a model that knows how often each token occurs in these rows, no more.

        Of this process's rows; nan if nothing is held out.
        """
        counts = np.zeros(1)
        for batch in self._batches:
            seen = np.bincount(batch["targets"][batch["loss_weights"] > 0])
            counts = np.pad(counts, (0, max(0, len(seen) - len(counts))))
            counts[: len(seen)] += seen
        shares = counts[counts > 0] / counts.sum()
        return float(-np.sum(shares * np.log(shares))) if len(shares) else float("nan")

    def __call__(self, state: Any) -> float | None:
        """Nats per token; None if nothing is held out."""
        sums = [self._step(state, self._place(batch)) for batch in self._batches]
        if not sums:
            return None
        losses, weights = zip(*jax.device_get(sums), strict=True)
        return float(sum(losses) / sum(weights))
