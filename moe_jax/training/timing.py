"""How long things take, a trace of them, and the step compiled for each shape of batch."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


class Clock:
    """Training speed between two looks at it, without what `paused` and compilation take."""

    def __init__(self, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self._since: float | None = None
        self._step: int | None = None

    def start(self, step: int) -> None:
        """Counts from here, where `step` steps are done."""
        self._since, self._step = time.perf_counter(), step

    def tokens_per_second(self, step: int) -> float:
        """Since the last call or `start`; what is waited for must be done."""
        assert self._since is not None and self._step is not None
        now = time.perf_counter()
        speed = (step - self._step) * self._tokens_per_step / (now - self._since)
        self.start(step)
        return speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing until the end; what is under way must be done."""
        assert self._since is not None
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin


class CompiledByShape:
    """A step (state, batch, scheduled) -> (state, metrics), compiled once for each shape of batch.

    The state is donated.
    """

    def __init__(self, step: Callable):
        self._step = jax.jit(step, donate_argnums=0)
        self._compiled: dict[tuple[int, ...], Any] = {}
        self.seconds = 0.0  # that the last compilation took

    def compile(self, state: Any, batch: dict[str, jax.Array], scheduled: Any) -> bool:
        """Whether this shape was new."""
        shape = batch["tokens"].shape
        if shape in self._compiled:
            return False
        begin = time.perf_counter()
        self._compiled[shape] = self._step.lower(state, batch, scheduled).compile()
        self.seconds = time.perf_counter() - begin
        return True

    def __call__(self, state: Any, batch: dict[str, jax.Array], scheduled: Any) -> tuple[Any, Any]:
        return self._compiled[batch["tokens"].shape](state, batch, scheduled)

    def bytes_per_device(self, batch: dict[str, jax.Array]) -> int:
        """Memory that a step takes on one device: its arguments, and what it needs besides."""
        memory = self._compiled[batch["tokens"].shape].memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes


class Trace:
    """A profiler trace of a range of steps."""

    def __init__(self, steps: range, directory: Path):
        self._steps, self._directory = steps, directory
        self._running = False

    def before(self, step: int) -> None:
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int) -> None:
        """The step must be done."""
        if self._running and step + 1 not in self._steps:
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
