"""What a run is asked for from outside: by signals, and by a file."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import moe_jax
from moe_jax.training.signals import Request, Requests

ROOT = Path(moe_jax.__path__[0]).parent


def _settled(requests: Requests) -> Request:
    """The next request; a signal takes a moment to arrive."""
    while (request := requests.settled()) is Request.NOTHING:
        os.sched_yield()
    return request


@pytest.mark.parametrize(
    ("number", "request_", "code"),
    [
        (signal.SIGINT, Request.STOP, 0),
        (signal.SIGTERM, Request.PREEMPT, 75),
        (signal.SIGUSR1, Request.PREEMPT, 75),
    ],
)
def test_a_signal_asks_for_the_end(
    number: signal.Signals, request_: Request, code: int, tmp_path: Path
) -> None:
    said = []
    with Requests(tmp_path, 0.0, said.append) as requests:
        assert requests.settled() is Request.NOTHING
        os.kill(os.getpid(), number)
        assert _settled(requests) is request_
        assert requests.settled() is request_  # until it has been heard
    assert request_.stops and request_.exit_code == code
    assert bool(said) == (request_ is Request.STOP)


def test_a_save_is_asked_for_once(tmp_path: Path) -> None:
    with Requests(tmp_path, 0.0, print) as requests:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert _settled(requests) is Request.SAVE
        assert requests.settled() is Request.NOTHING
        (tmp_path / "save").touch()
        assert requests.settled() is Request.SAVE
        assert requests.settled() is Request.NOTHING and not list(tmp_path.iterdir())
    assert not Request.SAVE.stops


def test_the_clock_asks_for_a_save(tmp_path: Path) -> None:
    with Requests(tmp_path, 1e-9, print) as requests:
        assert requests.settled() is Request.SAVE
    with Requests(tmp_path, 60.0, print) as requests:
        requests.saved()
        assert requests.settled() is Request.NOTHING


def test_the_gravest_counts(tmp_path: Path) -> None:
    with Requests(tmp_path, 0.0, lambda _: None) as requests:
        for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        while requests.settled() is not Request.PREEMPT:
            os.sched_yield()


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Requests(tmp_path, 0.0, print):
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


TWICE = """
import ctypes, os, signal
from pathlib import Path
from moe_jax.training.signals import Requests

libc = ctypes.CDLL(None)
with Requests(Path("."), 0.0, lambda text: print(text, flush=True)):
    os.kill(os.getpid(), signal.SIGINT)
    # A step of the longest kind: Python runs no handler before it is over.
    while True:
        libc.pause()
"""


def test_a_second_interrupt_leaves_at_once_even_in_a_step() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    with process.stdout:
        assert "once more leaves at once" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
