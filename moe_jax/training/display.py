"""What a person sees of a run: kept lines and, on a terminal, one live line of progress below them.

Where the output is not a terminal (a log file, a pipe) there are only the kept lines.
"""

import sys
from collections.abc import Iterable

from rich.live import Live
from rich.text import Text

from moe_jax.units import format_count, format_duration


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
