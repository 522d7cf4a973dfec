"""What packing must not change: a model's loss."""

import itertools
from typing import Any

import jax
import numpy as np
import step_runs
from emulated import quick_jit

from moe_jax.data.corpus import Span
from moe_jax.data.packing import pack_once
from moe_jax.training.loop import global_batch
from moe_jax.training.step import make_eval_step

ROWS, LENGTH = step_runs.ROWS, step_runs.LENGTH


class _Documents:
    """Of tokens at random, weighing 0.5 or 1."""

    def __init__(self, lengths: list[int]):
        rng = np.random.default_rng(0)
        self.spans = [Span(i, 0, length) for i, length in enumerate(lengths)]
        self._texts = [
            (
                rng.integers(1, step_runs.VOCAB, length + 1, np.int32),
                rng.choice([0.5, 1.0], length + 1).astype(np.float32),
            )
            for length in lengths
        ]

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self._texts[i]


def test_the_loss_of_packed_documents_is_that_of_each_alone() -> None:
    lengths = [1, 9, 4, 16, 2, 11, 5, 3, 8, 15, 6, 1, 7, 12, 10, 13]
    corpus: Any = _Documents(lengths)

    def total(packing: str, mask_documents: bool = True) -> tuple[int, float, float]:
        """Rows, the loss in nats, and the weights."""
        rows = pack_once(
            corpus,
            corpus.spans,
            length=LENGTH,
            packing=packing,
            bins=8,
            mask_documents=mask_documents,
        )
        count, losses, weights = 0, 0.0, 0.0
        while batch := list(itertools.islice(rows, ROWS)):
            count += len(batch)
            padding = {name: np.zeros_like(array) for name, array in batch[0].items()}
            batch += [padding] * (ROWS - len(batch))
            stacked = {name: np.stack([row[name] for row in batch])[None] for name in padding}
            loss, weight = step(state, global_batch(stacked, mesh, (0, 1, 1)))
            losses, weights = losses + float(loss), weights + float(weight)
        return count, losses, weights

    state, mesh = step_runs.make_state(), step_runs.mesh_of(())
    with jax.set_mesh(mesh):
        step = quick_jit(make_eval_step(step_runs.CONFIG))
        packed, alone, unmasked = total("best_fit"), total("none"), total("best_fit", False)
    assert packed[0] < alone[0] == len(lengths)
    assert packed[2] == alone[2] == unmasked[2]
    np.testing.assert_allclose(packed[1], alone[1], rtol=1e-5)
    assert abs(unmasked[1] / alone[1] - 1) > 1e-3, "what documents see of each other shows"
