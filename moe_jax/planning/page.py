"""A plan as one page with pictures; it loads nothing from elsewhere.

It draws what a plan in JSON holds, and leaves out what it does not: `memory_per_device` {total,
by_kind, capacity}, `flops_per_token.by_group`, `communication_per_step` {total, by_kind},
`step_seconds` and `seconds_by_part`; `serving` and `compiled`; `not_planned`, why there is no step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from moe_jax.units import format_amount, format_bytes, format_count

WIDTH, ROW, LEFT, RIGHT = 720, 24, 190, 110  # of a picture, in pixels: names left, figures right
BAR = WIDTH - LEFT - RIGHT
MOST_SCOPES = 12  # of a compiled step's operations that have a bar
# Told apart by people who see colours differently (after Okabe and Ito, and Tol).
COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"),
    *("#882255", "#999933", "#44aa99", "#ddcc77", "#aa4499", "#888888"),
)
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #8884; --bad: #c22; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --paper: #161616; --bad: #f66; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 760px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.4em; margin-bottom: 0; } h2 { font-size: 1.1em; margin: 1.8em 0 .3em; }
dl { display: flex; flex-wrap: wrap; gap: 1em 2.5em; margin: 1.2em 0; }
dt { font-size: .85em; opacity: .7; } dd { font-size: 1.3em; margin: 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 13px; }
.back { fill: var(--faint); } .limit { stroke: var(--ink); stroke-width: 2; }
.bad { fill: var(--bad) !important; color: var(--bad); }
"""


def page(plan: Mapping[str, Any]) -> str:
    """The whole HTML."""
    title = " on ".join(str(plan[name]) for name in ("config", "topology") if name in plan)
    memory, flops = plan.get("memory_per_device", {}), plan.get("flops_per_token", {})
    communication = plan.get("communication_per_step", {})
    sections = [
        _section("Memory of a device at the peak of a step", _memory(memory)),
        _section(
            "Operations of a token, forward",
            _bars(flops.get("by_group", {}), format_count),
        ),
        _section(
            "What a device sends in a step", _bars(communication.get("by_kind", {}), format_bytes)
        ),
        _section(
            "Time of a step by part, each as if alone",
            _bars(plan.get("seconds_by_part", {}), _seconds, plan.get("step_seconds"), "a step"),
        ),
        *_serving(plan.get("serving", {})),
        *_compiled(plan.get("compiled", {}), memory.get("capacity")),
    ]
    mesh, why = plan.get("mesh"), plan.get("not_planned")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n"
        + (f"<p>mesh {escape(_mesh(mesh))}</p>\n" if mesh else "")
        + (f"<p>training not planned: {escape(why)}</p>\n" if why else "")
        + _key_figures(plan)
        + "".join(sections)
        + "</body>\n</html>\n"
    )


def _mesh(mesh: Any) -> str:
    if not isinstance(mesh, Mapping):
        return str(mesh)
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size != 1) or "of one"


def _key_figures(plan: Mapping[str, Any]) -> str:
    parameters = plan.get("parameters", {})
    shown = (
        ("parameters", parameters.get("total"), format_count),
        ("of one token", parameters.get("active"), format_count),
        ("a step", plan.get("step_seconds"), _seconds),
        ("tokens/s of a device", plan.get("tokens_per_second_per_device"), "{:,.0f}".format),
        ("MFU", plan.get("mfu"), "{:.1%}".format),
        ("device-hours", plan.get("device_hours"), format_amount),
        ("cost", plan.get("cost"), format_count),
    )
    return _figures({name: form(value) for name, value, form in shown if value is not None})


def _figures(texts: Mapping[str, str]) -> str:
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in texts.items()
    )
    return f"<dl>{''.join(items)}</dl>\n"


def _serving(serving: Mapping[str, Any]) -> Iterator[str]:
    """What fits and how fast it is; a bar for each part of a step that decodes."""
    if not serving:
        return
    shown = {
        "context": f"{serving['context']:,}",
        "longest context": f"{serving['longest_context']:,}",
        "sequences at once": f"{serving['sequences']:,}",
    }
    for name, title in (
        ("decode", "decoding"),
        ("decode_one", "one alone"),
        ("prefill", "prompts"),
    ):
        part = serving.get(name, {})
        if part:
            shown[f"{title}, tokens/s"] = _bounds(part["tokens_per_second"])
        if "price_per_million_tokens" in part:
            shown[f"{title}, a million"] = _bounds(part["price_per_million_tokens"])
    yield _section("Serving", _figures(shown))
    seconds = serving.get("decode", {}).get("seconds", {})
    yield _section("Time to decode a token of each, by part, as if alone", _bars(seconds, _seconds))


def _bounds(bounds: Sequence[float]) -> str:
    return " to ".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in bounds)


def _compiled(compiled: Mapping[str, Any], capacity: float | None) -> Iterator[str]:
    """What the compiler needs and does; of what is too large, by how much."""
    memory = compiled.get("memory_per_device", {})
    kinds = {name: memory[name] for name in ("state", "temporaries") if name in memory}
    whole = {
        "total": memory.get("total"),
        "by_kind": kinds or {"in all": memory.get("total", 0.0)},
        "capacity": memory.get("available", capacity),
    }
    yield _section("Compiled: memory of a device", _memory(whole))
    scopes = {
        name.replace("multi_token_prediction", "mtp").replace("_layers", "").replace("_", " "): n
        for name, n in compiled.get("flops_by_scope", {}).items()
    }
    scopes = dict(list(_largest_first(scopes).items())[:MOST_SCOPES])
    yield _section("Compiled: operations of a device in a step", _bars(scopes, format_count))
    sent = {kind: of["bytes"] for kind, of in compiled.get("collectives", {}).items()}
    yield _section("Compiled: what a device sends in a step", _bars(sent, format_bytes))


def _section(title: str, picture: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{picture}</section>\n" if picture else ""


def _memory(memory: Mapping[str, Any]) -> str:
    """All kinds in one bar against the device's capacity, then each alone."""
    kinds = _largest_first(memory.get("by_kind", {}))
    if not kinds:
        return ""
    total = memory.get("total", sum(kinds.values()))
    capacity = memory.get("capacity")
    full = max(total, capacity or 0)
    parts, x = [], 0.0
    for i, (name, size) in enumerate(kinds.items()):
        label = f"{name}: {format_bytes(size)}"
        parts.append(_bar(LEFT + x, 6, BAR * size / full, COLOURS[i % len(COLOURS)], label))
        x += BAR * size / full
    picture = [
        f'<text x="{LEFT - 8}" y="24" text-anchor="end">all</text>',
        f'<rect class="back" x="{LEFT}" y="6" width="{BAR}" height="{ROW}"/>',
        *parts,
        f'<text x="{LEFT + BAR + 8}" y="24">{format_bytes(total)}</text>',
    ]
    if capacity:
        end = LEFT + BAR * capacity / full
        over = total - capacity
        told = (
            f'<text class="bad" x="{LEFT}" y="48">'
            f"{format_bytes(over)} more than its {format_bytes(capacity)}</text>"
            if over > 0
            else f'<text x="{end:.1f}" y="48" text-anchor="end">of {format_bytes(capacity)}</text>'
        )
        line = f'<line class="limit" x1="{end:.1f}" x2="{end:.1f}" y1="2" y2="{ROW + 10}"/>'
        picture += [line, told]
    return _svg(54, picture) + _bars(kinds, format_bytes, colours=COLOURS)


def _bars(
    values: Mapping[str, float],
    form: Callable[[float], str],
    limit: float | None = None,
    limit_name: str = "",
    colours: Sequence[str] = COLOURS[:1],
) -> str:
    """A bar for each value, the largest first, and a line at a limit."""
    values = _largest_first(values)
    if not values:
        return ""
    full = max(*values.values(), limit or 0.0, 1e-300)
    picture = []
    for i, (name, value) in enumerate(values.items()):
        y, colour, told = i * ROW, colours[i % len(colours)], form(value)
        picture += [
            f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>',
            _bar(LEFT, y + 3, max(1.0, BAR * value / full), colour, f"{name}: {told}", ROW - 6),
            f'<text x="{LEFT + BAR + 8}" y="{y + 17}">{escape(told)}</text>',
        ]
    height = len(values) * ROW
    if limit:
        x = LEFT + BAR * limit / full
        picture += [
            f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>',
            f'<text x="{x:.1f}" y="{height + 16}" text-anchor="end">'
            f"{escape(f'{limit_name}: {form(limit)}')}</text>",
        ]
        height += ROW
    return _svg(height, picture)


def _largest_first(values: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted((item for item in values.items() if item[1]), key=lambda item: -item[1]))


def _bar(x: float, y: float, width: float, colour: str, label: str, height: float = ROW) -> str:
    place = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"'
    return f'<rect {place} fill="{colour}"><title>{escape(label)}</title></rect>'


def _svg(height: float, parts: list[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">\n{inside}\n</svg>\n'


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
