"""How long one of many calls takes on a device that works through a queue of them.

Of the standard library alone, so that it works in a peer's environment too.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_seconds(
    call: Callable[[], Any], wait: Callable[[Any], object], calls: int = 10, rounds: int = 5
) -> float:
    """The median over rounds of the seconds of a call, of `calls` that queue up before a wait.

    Args:
      wait: returns once the result of a call, and so of all before it, is there.
    """
    for _ in range(2):  # compiles, and warms up
        wait(call())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)
