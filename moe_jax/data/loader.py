"""Host batches of the training run, made ahead in a thread, and of evaluation.

Row r of a step's R rows comes from logical stream r // (R / S), of S streams fixed in the config,
so the batch at a step is a function of config and seed alone. Row r is row r // M of micro-batch
r % M: its part of the micro-batch's rows belongs to one device, so a process feeds neighbouring
streams whatever the number M of micro-batches.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from moe_jax.config import Config
from moe_jax.curriculum import masks_documents, micro_batches, num_rows, source_weights, stage_at
from moe_jax.data.corpus import Corpus, Span
from moe_jax.data.packing import Row, State, Stream, pack_once

Batch = dict[str, np.ndarray]
Share = tuple[int, int, int]
Groups = Sequence[Sequence[Span]]


class _BatchIterator(grain.DatasetIterator):
    """State: {"step": batches made, "streams": {index: state}} of the streams that it runs."""

    def __init__(self, config: Config, corpus: Corpus, groups: Groups, share: Share):
        super().__init__()
        self._config, self._corpus, self._groups, self._share = config, corpus, groups, share
        self._streams: dict[int, Stream] = {}
        self._open(0, {})

    def _open(self, step: int, states: dict[str, State]) -> None:
        data = self._config.data
        self._step = step
        # The state was taken after step - 1, so the streams still stand in that step's stage.
        self._stage = stage_at(self._config, max(step - 1, 0))
        first, last, count = self._share
        # Stream s feeds rows [s, s + 1) / S of the batch; this process needs [first, last) / count.
        begin, end = first * data.num_streams // count, -(-last * data.num_streams // count)
        self._streams = {
            index: Stream(
                self._corpus,
                self._groups,
                source_weights(self._config, self._stage),
                index=index,
                num_streams=data.num_streams,
                seed=self._config.seed,
                packing=data.packing,
                bins=data.packing_bins,
                length=self._stage.sequence_length,
                state=states.get(str(index)),
            )
            for index in range(begin, end)
        }

    def __next__(self) -> Batch:
        config = self._config
        stage = stage_at(config, self._step)
        for stream in self._streams.values():
            stream.set_stage(stage.sequence_length, source_weights(config, stage))
        self._stage = stage
        total = num_rows(config, stage)
        per_stream = total // config.data.num_streams
        masked = masks_documents(config, stage)
        streams = self._streams.values()
        rows = [stream.next_row(masked) for stream in streams for _ in range(per_stream)]
        # Streams are run whole, so that they stay the same however they are shared out.
        first, last, count = self._share
        skip = first * total // count - min(self._streams) * per_stream
        rows = rows[skip : skip + (last - first) * total // count]
        self._step += 1
        return _stack(rows, micro_batches(config, stage))

    def get_state(self) -> State:
        states = {str(index): stream.get_state() for index, stream in self._streams.items()}
        return {"step": self._step, "streams": states}

    def set_state(self, state: State) -> None:
        self._open(state["step"], state["streams"])


class _Batches(grain.IterDataset):
    def __init__(self, *arguments):
        super().__init__()
        self._arguments = arguments

    def __iter__(self) -> _BatchIterator:
        return _BatchIterator(*self._arguments)


def _stack(rows: Sequence[Row], parts: int) -> Batch:
    """[parts, rows / parts, length] of each array."""
    return {
        name: np.swapaxes(
            np.stack([row[name] for row in rows]).reshape(-1, parts, len(rows[0][name])),
            0,
            1,
        )
        for name in rows[0]
    }


def train_batches(
    config: Config, corpus: Corpus, groups: Groups, share: Share, state: State | None = None
) -> Any:
    """An endless iterator over this process's part of each step's batch.

    A batch is a dict of arrays [micro_batches, rows, length]: `tokens`, `targets`, `segment_ids`,
    `positions` int32 and `loss_weights` float32.

    Args:
      config: of the run.
      corpus: that the spans point into.
      groups: the training spans of each source, of `split_holdout`.
      share: this process feeds parts [first, last) of `count` equal ones (first, last, count).
      state: of `get_state`, with the streams of all processes, to go on from there.
    Returns:
      A Grain iterator: `next(it)`; `it.get_state()`, a JSON-able document of the state after the
      last batch taken, {"step", "streams"}, holding this process's streams; `it.close()`.
    """
    dataset = _Batches(config, corpus, groups, share)
    if config.data.prefetch:
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=config.data.prefetch
        )
    iterator = iter(dataset)
    if state is not None:
        iterator.set_state(state)
    return iterator


def eval_batches(
    config: Config, corpus: Corpus, spans: Sequence[Span], length: int, rows: int, share: Share
) -> list[Batch]:
    """The first `eval_batches` batches of the held-out spans, [1, rows, length] over all processes.

    They are the same at every evaluation; the last is filled up with rows of padding.
    """
    packed = pack_once(
        corpus,
        spans,
        length=length,
        packing=config.data.packing,
        bins=config.data.packing_bins,
        mask_documents=config.data.mask_documents,
    )
    wanted = list(itertools.islice(packed, config.training.eval_batches * rows))
    if wanted:
        padding = {name: np.zeros_like(array) for name, array in wanted[0].items()}
        wanted += [padding] * (-len(wanted) % rows)
    first, last, count = share
    return [
        _stack(wanted[start + first * rows // count : start + last * rows // count], 1)
        for start in range(0, len(wanted), rows)
    ]
