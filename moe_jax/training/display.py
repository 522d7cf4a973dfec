"""What a person sees of a run: kept lines and, on a terminal, one live line of progress below them.

Where the output is not a terminal (a log file, a pipe) there are only the kept lines.
"""

import sys
from collections.abc import Iterable

from rich.live import Live
from rich.text import Text

COUNT_UNITS = ("", "K", "M", "B", "T")
BYTE_UNITS = (" B", " KiB", " MiB", " GiB", " TiB", " PiB")


class Display:
    """Prints for a person; `enabled` is False on all processes but the first, which stay silent."""

    def __init__(self, total_steps: int, enabled: bool) -> None:
        self._total_steps = total_steps
        self._enabled = enabled
        self._live: Live | None = None
        if enabled and sys.stdout.isatty():
            # Transient: the progress line goes when the run ends; the kept lines stay.
            self._live = Live(Text(), auto_refresh=False, transient=True)
            self._live.start()

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        if self._live:
            # As it is: no wrapping, colours or markup, so that a copied line equals a logged one.
            self._live.console.print(text, soft_wrap=True, markup=False, highlight=False)
        elif self._enabled:
            print(text, flush=True)

    def lines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.line(text)

    def progress(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        mfu: float | None,
        seconds_left: float,
    ) -> None:
        """Redraws the live line, if there is one.

        Args:
          step: updates done.
          loss: the last known training loss, in nats a token.
          tokens_per_second: over all devices.
          mfu: model FLOPs utilization, from 0 to 1; None where the device's peak is not known.
          seconds_left: to the end of the run.
        """
        if self._live:
            text = progress_text(
                step, self._total_steps, loss, tokens_per_second, mfu, seconds_left
            )
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self) -> None:
        """Removes the live line and gives the terminal back; no harm if called twice."""
        if self._live:
            self._live.stop()


def progress_text(
    step: int,
    total_steps: int,
    loss: float,
    tokens_per_second: float,
    mfu: float | None,
    seconds_left: float,
) -> str:
    """The live line, of at most 80 columns; for the arguments see `Display.progress`."""
    parts = [f"step {step}/{total_steps}", f"loss {loss:.4f}"]
    parts.append(f"{format_count(tokens_per_second)} tokens/s")
    if mfu is not None:
        parts.append(f"MFU {mfu:.1%}")
    parts.append(f"{format_duration(seconds_left)} left")
    return "  ".join(parts)


def format_count(count: float) -> str:
    """671026419200 as "671.0B": thousands, millions, billions, trillions; below 1000 as it is."""
    return _scaled(round(count), 1000, COUNT_UNITS)


def format_bytes(size: float) -> str:
    """1610612736 as "1.5 GiB"; below one KiB in whole bytes."""
    return _scaled(round(size), 1024, BYTE_UNITS)


def format_duration(seconds: float) -> str:
    """65 as "1m 05s": the two largest of days, hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}h"
    if hours:
        return f"{hours}h {minute:02}m"
    if minutes:
        return f"{minutes}m {second:02}s"
    return f"{second}s"


def _scaled(value: int, base: int, units: tuple[str, ...]) -> str:
    if value < base:
        return f"{value}{units[0]}"
    scaled, unit = float(value), 0
    # Rounded first: 999,960 is 1.0M, not 1000.0K.
    while round(scaled, 1) >= base and unit + 1 < len(units):
        scaled /= base
        unit += 1
    return f"{scaled:.1f}{units[unit]}"
