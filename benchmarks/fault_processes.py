"""The command in processes of its own, to be killed; imports, which take longest, are made once."""

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

# Dotted names, and what makes their new values of the old ones.
Changed = Mapping[str, Callable[[Any], Any]]


def command(arguments: list[str], log: Path, changed: Changed) -> None:
    """`python -m moe_jax.main`, in a process that has imported it already."""
    from moe_jax import command_line, main

    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name, change in changed.items():
        module, _, attribute = name.rpartition(".")
        place = importlib.import_module(module)
        setattr(place, attribute, change(getattr(place, attribute)))
    sys.argv = ["moe_jax.main", *arguments]
    command_line.run(main.main)


def start(arguments: list[str], log: Path, changed: Changed = MappingProxyType({})) -> Any:
    """Starts the command; imports take longer than the run, so they are made once, in a server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_jax.main", "benchmarks.fault_processes"])
    process = context.Process(target=command, args=(arguments, log, dict(changed)))
    process.start()
    return process


def finish(arguments: list[str], log: Path, timeout: float = 600) -> int:
    """The exit code."""
    process = start(arguments, log)
    process.join(timeout)
    assert process.exitcode is not None, f"still running after {timeout} s: {log.read_text()}"
    return process.exitcode


def wait(process: Any, holds: Callable[[], bool], log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.exitcode is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.01)
