"""How long things take, a trace of them, and the steps compiled for the stages of a run."""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moe_jax.config import Config, Stage
from moe_jax.curriculum import at_stage
from moe_jax.schedules import scheduled
from moe_jax.training.step import abstract_batch, batch_shape, make_train_step


class Clock:
    """Training speed between two looks at it, without what `paused` and compilation take."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens = 0
        self._waited = 0.0

    def start(self, tokens: int) -> None:
        """Counts from here, where so many tokens are seen."""
        self._since, self._tokens, self._waited = time.perf_counter(), tokens, 0.0

    def look(self, tokens: int) -> tuple[float, float]:
        """Tokens per second and the share of time waited for data, since the last call or `start`.

        Steps that are under way must be waited for before.
        """
        assert self._since is not None
        elapsed = time.perf_counter() - self._since
        found = (tokens - self._tokens) / elapsed, self._waited / elapsed
        self.start(tokens)
        return found

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waited for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing until the end; what is under way must be done."""
        assert self._since is not None
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin


class CompiledSteps:
    """The train step of each stage: (state, batch, scheduled) -> (state, metrics), state donated.

    A step is compiled once for each shape of batch and rotary scaling, in a thread, so that the
    next stage's can be compiled while this one's trains.

    Args:
      state: that steps will be given; its shapes and shardings count.
    """

    def __init__(self, config: Config, mesh: Mesh, state: Any):
        self._config, self._mesh = config, mesh
        self._state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._found: dict[Any, concurrent.futures.Future[CompiledStep]] = {}

    def _key(self, stage: Stage) -> Any:
        return batch_shape(self._config, stage), stage.rope_factor

    def keep(self, stages: Iterable[Stage]) -> None:
        """Lets go of the memory that all other stages' steps take, on the host and on devices."""
        keys = {self._key(stage) for stage in stages}
        self._found = {key: step for key, step in self._found.items() if key in keys}

    def start(self, stage: Stage) -> bool:
        """Whether this stage's step is a new one; then it will be compiled as soon as can be."""
        key = self._key(stage)
        if key in self._found:
            return False
        self._found[key] = self._pool.submit(self._compile, stage)
        return True

    def wait(self, stage: Stage) -> "CompiledStep":
        """The step of a stage, once it is compiled."""
        self.start(stage)
        return self._found[self._key(stage)].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _compile(self, stage: Stage) -> "CompiledStep":
        config, begin = at_stage(self._config, stage), time.perf_counter()
        with jax.set_mesh(self._mesh):
            step = jax.jit(make_train_step(config), donate_argnums=0)
            batch = abstract_batch(config, stage, self._mesh)
            compiled = step.lower(self._state, batch, scheduled(config, 0)).compile()
        return CompiledStep(compiled, time.perf_counter() - begin, sum(memory_of(compiled)))


def memory_of(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Bytes of one device: of a program's arguments, and of what is allocated for it besides.

    JAX before 0.11 tells the second from `temp_size_in_bytes` alone, in which TPU's compiler counts
    some more than once.
    """
    memory = compiled.memory_analysis()
    assert memory is not None
    arguments = memory.argument_size_in_bytes
    total = getattr(memory, "total_allocation_bytes", 0)
    return arguments, total - arguments if total else memory.temp_size_in_bytes


class CompiledStep(NamedTuple):
    """A compiled step, the seconds that took, and the memory that it takes on one device: its
    arguments, and what it needs besides."""

    call: Callable[[Any, dict[str, jax.Array], dict[str, Any]], tuple[Any, Any]]
    seconds: float
    bytes_per_device: int


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
