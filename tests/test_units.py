"""Numbers as a person reads them."""

import pytest

from moe_jax.units import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (999.7, "1.0K"), (12345, "12.3K"), (999_960, "1.0M")]
    + [(671026419200, "671.0B"), (14.8e12, "14.8T"), (3e16, "30000.0T")],
)
def test_format_count(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**30, "1.5 GiB")],
)
def test_format_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (5, "5s"), (59.6, "1m 00s"), (65, "1m 05s"), (3725, "1h 02m")]
    + [(2 * 86400 + 3 * 3600, "2d 03h")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
