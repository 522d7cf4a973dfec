"""Two plans in JSON side by side: the figures that differ, and their ratios."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.fields import read_json
from moe_jax.units import format_bytes, format_count

# Figures under these names are bytes.
BYTES = ("memory_per_device", "communication_per_step", "bytes_accessed", "cache_bytes_per_token")


def lines(first: Path, second: Path) -> list[str]:
    """For a person, in 80 columns.

    Raises:
      UserError: a file holds no JSON object.
    """
    before, now = (_figures(read_json(file)) for file in (first, second))
    changed = [path for path in {**before, **now} if before.get(path) != now.get(path)]
    if not changed:
        return [f"{first} and {second} plan the same"]
    told = [
        f"A  {first}",
        f"B  {second}",
        "",
        f"{'':38} {'A':>15} {'B':>15} {'B / A':>9}",
    ]
    for name in changed:
        a, b = before.get(name), now.get(name)
        # The end of a long name says the most.
        shown = name if len(name) <= 38 else f"...{name[-35:]}"
        row = f"{shown:38} {_figure(name, a):>15} {_figure(name, b):>15} {_ratio(a, b):>9}"
        told.append(row.rstrip())
    return told


def _figures(value: Any, path: str = "") -> dict[str, Any]:
    """Every figure by its whole name, so that of a group that one plan lacks each is shown.

    The entries of a list are compared one by one. A list of objects is left out: what stands at a
    place of the one may be elsewhere in the other.
    """
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value) if not isinstance(item, Mapping)}
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= _figures(item, f"{path}.{name}" if path else name)
    return found


def _figure(name: str, value: Any) -> str:
    if value is None:
        return "-"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        text = str(value)
        return text if len(text) <= 15 else f"{text[:12]}..."
    if set(name.split(".")) & set(BYTES):
        return format_bytes(value)
    return format_count(value) if abs(value) >= 1000 else f"{value:.4g}"


def _ratio(a: Any, b: Any) -> str:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return f"{b / a:.3g}x" if numbers and a else ""
