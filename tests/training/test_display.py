"""What a person sees, on a terminal and off it."""

import io
import sys

import pytest

from moe_jax.training.display import Display, progress_text


class Terminal(io.StringIO):
    """A stream that says it is a terminal and remembers what was written."""

    def isatty(self) -> bool:
        return True


def test_progress_fits_80_columns_in_a_long_run() -> None:
    text = progress_text(1_000_000, 1_000_000, 12.3456, 999_900_000, 1.0, 86400 * 99)
    assert text == "step 1000000/1000000  loss 12.3456  999.9M tokens/s  MFU 100.0%  99d 00h left"
    assert len(text) <= 80


def test_off_a_terminal_only_kept_lines_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(10, enabled=True)
    display.line("step 1  [bold]loss[/bold] 5.5")
    display.progress(1, 5.5, 1000.0, None, 60.0)
    display.close()
    assert capsys.readouterr().out == "step 1  [bold]loss[/bold] 5.5\n"


def test_other_processes_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    display = Display(10, enabled=False)
    display.line("hello")
    display.progress(1, 5.5, 1000.0, None, 60.0)
    display.close()
    assert terminal.getvalue() == ""


def test_on_a_terminal_lines_stay_and_progress_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    display = Display(10, enabled=True)
    display.line("x" * 100 + " [bold]kept[/bold]")
    display.progress(3, 5.5, 12345.0, 0.412, 65.0)
    display.close()
    display.close()
    output = terminal.getvalue()
    assert "x" * 100 + " [bold]kept[/bold]" in output
    assert "step 3/10  loss 5.5000  12.3K tokens/s  MFU 41.2%  1m 05s left" in output
    assert output.rstrip().endswith("\x1b[2K"), "the live line is erased at the end"
