"""The train step, compiled for devices that need not be here.

It is the very function that trains, with the compiler's flags that training sets. `prepare` comes
before the first use of JAX in a process.
"""

import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moe_jax import platform, sharding
from moe_jax.config import Config
from moe_jax.curriculum import at_stage, main_stage
from moe_jax.planning import buffers, compiled_step, topologies
from moe_jax.planning.compiled_step import CompiledStep, TooLarge
from moe_jax.schedules import scheduled
from moe_jax.training.step import abstract_batch, abstract_state, make_train_step
from moe_jax.training.timing import memory_of

# How TPU's compiler says that a program needs more memory than there is.
_TOO_LARGE = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")


def prepare(dump: Path | None = None) -> None:
    """Sets what compilers read from the environment, as for those who train.

    Args:
      dump: a folder for what XLA writes of each program, for `planning.buffers`.
    """
    topologies.prepare()
    for variable, flags in platform.FLAGS.values():
        given = os.environ.get(variable, "")
        os.environ[variable] = f"{platform.missing_flags(flags, given)} {given}".strip()
    if dump is not None and "--xla_dump_to" not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" --xla_dump_to={dump} --xla_dump_hlo_as_text=true"


def figures(config: Config, topology: str) -> dict[str, Any]:
    """What a plan says of its compiled step; of one that is too large, by how much.

    Raises:
      UserError: nothing here compiles for the topology.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        devices = topologies.devices(topology)
        try:
            found = compiled_step.figures(compile_step(config, devices), config)
        except TooLarge as error:
            found = error.figures()
        return found | {"largest": [b._asdict() for b in buffers.largest(Path(folder), 3)]}


def compile_step(config: Config, devices: Sequence[Any]) -> CompiledStep:
    """The train step of the stage that sees most tokens.

    Raises:
      TooLarge: a device's memory cannot hold the program (TPU; for GPU nothing refuses it).
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    stage = main_stage(config)
    config = at_stage(config, stage)
    with jax.set_mesh(mesh):
        state = abstract_state(config, mesh)
        batch = abstract_batch(config, stage, mesh)
        begin = time.perf_counter()
        step = jax.jit(make_train_step(config), donate_argnums=0)
        lowered = step.lower(state, batch, scheduled(config, 0))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found = _TOO_LARGE.search(str(error))
            if found is None:
                raise
            raise TooLarge(_bytes(*found.groups()[:2]), _bytes(*found.groups()[2:])) from error
        seconds = time.perf_counter() - begin
    text = compiled.as_text()
    assert text is not None
    return CompiledStep(text, mesh, state, *memory_of(compiled), seconds)


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)
