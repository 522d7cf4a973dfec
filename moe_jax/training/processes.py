"""What the processes of a run settle among themselves."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.config import UserError


def largest(value: int) -> int:
    """The largest of all processes' values; all of them must ask, at the same place."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def gathered(text: str) -> list[str]:
    """Every process's text, in their order; all of them must ask, at the same place."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    padded = np.zeros(largest(len(data)), np.uint8)  # no text holds a zero
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [np.asarray(row, np.uint8).tobytes().rstrip(b"\0").decode() for row in rows]


def all_or_none(attempt: Callable[[], None]) -> None:
    """Makes an attempt on every process; if it fails on one, all raise that one's `UserError`."""
    sentence = ""
    try:
        attempt()
    except UserError as error:
        sentence = str(error)
    failed = [text for text in gathered(sentence) if text]
    if failed:
        raise UserError(failed[0])
