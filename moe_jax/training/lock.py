"""One run at a time on a work directory."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from moe_jax.config import UserError


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds WORKDIR/lock, which says who does.

    The system lets go of it when the process ends, however that happens: a file that was left
    behind locks nothing.

    Raises:
      UserError: another process holds it.
    """
    path = workdir / "lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"another run writes to the work directory {workdir}: {holder}; stop that one or "
                "give another --workdir"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # the last holder removed the file between our two calls
    try:
        here = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().isoformat(" ", "seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(here).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        there = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {there['process']} on {there['host']}, since {there['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has just started"
