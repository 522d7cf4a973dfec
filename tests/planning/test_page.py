"""The page: well-formed, to scale, complete in itself."""

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from moe_jax.planning.page import BAR, LEFT, page

GIB = 2**30
PLAN: dict[str, Any] = {
    "config": "configs/<mine> & yours.py",
    "topology": "h100:4x8",
    "mesh": {"data": 1, "fsdp": 4, "expert": 8},
    "parameters": {"total": 671026419200, "active": 37552282624},
    "memory_per_device": {
        "total": 40 * GIB,
        "capacity": 80 * GIB,
        "by_kind": {"parameters": 10 * GIB, "kept <activations>": 30 * GIB, "nothing": 0},
    },
    "flops_per_token": {"by_group": {"routed": 40e9, "attention": 10e9}},
    "communication_per_step": {"by_kind": {"dispatch": GIB}},
    "step_seconds": 2.0,
    "seconds_by_part": {"compute": 1.5, "memory": 0.005},
    "tokens_per_second_per_device": 1543.2,
    "mfu": 0.3894,
}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _pictures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def _widths(picture: ElementTree.Element) -> dict[str, float]:
    """Of bars, by their titles."""
    return {
        bar.findtext("title", ""): float(bar.get("width", "nan"))
        for bar in picture.iter("rect")
        if bar.find("title") is not None
    }


def test_bars_are_to_scale() -> None:
    all_kinds, kinds, operations, sent, seconds = _pictures(page(PLAN))
    activations, parameters = "kept <activations>: 30.0 GiB", "parameters: 10.0 GiB"
    widths = _widths(all_kinds)
    assert widths == pytest.approx({activations: BAR * 3 / 8, parameters: BAR / 8}, abs=0.1)
    # Side by side, on the capacity's own bar.
    places = [float(bar.get("x", "nan")) for bar in all_kinds.iter("rect")]
    assert places == pytest.approx([LEFT, LEFT, LEFT + BAR * 3 / 8], abs=0.1)
    (line,) = all_kinds.iter("line")
    assert float(line.get("x1", "nan")) == LEFT + BAR
    assert _widths(kinds) == pytest.approx({activations: BAR, parameters: BAR / 3}, abs=0.1)
    assert _widths(operations) == pytest.approx({"routed: 40.0B": BAR, "attention: 10.0B": BAR / 4})
    assert _widths(sent) == {"dispatch: 1.0 GiB": BAR}
    assert _widths(seconds) == pytest.approx(
        {"compute: 1.5 s": BAR * 0.75, "memory: 5 ms": BAR / 400}, abs=0.1
    )
    (line,) = seconds.iter("line")
    assert float(line.get("x1", "nan")) == LEFT + BAR


def test_what_does_not_fit_is_said() -> None:
    assert 'class="bad"' not in page(PLAN).split("</style>")[1]
    small = PLAN | {"memory_per_device": PLAN["memory_per_device"] | {"capacity": 32 * GIB}}
    picture = _pictures(page(small))[0]
    (told,) = (text for text in picture.iter("text") if text.get("class") == "bad")
    assert told.text == "8.0 GiB more than its 32.0 GiB"
    (line,) = picture.iter("line")
    assert float(line.get("x1", "nan")) == pytest.approx(LEFT + BAR * 0.8, abs=0.1)


def test_the_page_is_whole_and_alone() -> None:
    text = page(PLAN)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script", text)
    for shown in ("configs/&lt;mine&gt; &amp; yours.py on h100:4x8", "mesh fsdp 4, expert 8"):
        assert shown in text
    for shown in ("671.0B", "37.6B", "1,543", "38.9%", "2 s"):
        assert f"<dd>{shown}</dd>" in text


SERVING = {
    "context": 131072,
    "longest_context": 399074,
    "sequences": 24,
    "decode": {
        "seconds": {"memory": 0.02, "compute": 0.01},
        "tokens_per_second": [688.4, 1043.2],
        "price_per_million_tokens": [4.26, 6.46],
    },
    "prefill": {"seconds": {"compute": 1.0}, "tokens_per_second": [12772.0, 13038.0]},
}
COMPILED = {
    "memory_per_device": {"total": 60 * GIB, "state": 20 * GIB, "temporaries": 40 * GIB},
    "flops_by_scope": {f"moe_layers {i} backward": 1e9 * (20 - i) for i in range(20)},
    "collectives": {"all-gather": {"count": 3, "bytes": 2 * GIB}},
}


def test_serving_and_the_compiled_step() -> None:
    text = page(PLAN | {"serving": SERVING, "compiled": COMPILED})
    for shown in ("131,072", "399,074", "24", "688 to 1,043", "4.26 to 6.46", "12,772 to 13,038"):
        assert f"<dd>{shown}</dd>" in text
    decode, memory, kinds, operations, sent = _pictures(text)[-5:]
    assert _widths(decode) == pytest.approx({"memory: 20 ms": BAR, "compute: 10 ms": BAR / 2})
    state, temporaries = "state: 20.0 GiB", "temporaries: 40.0 GiB"
    assert _widths(memory) == pytest.approx({state: BAR / 4, temporaries: BAR / 2}, abs=0.1)
    assert _widths(kinds) == pytest.approx({state: BAR / 2, temporaries: BAR}, abs=0.1)
    assert len(_widths(operations)) == 12 and "moe 0 backward: 20.0B" in _widths(operations)
    assert _widths(sent) == {"all-gather: 2.0 GiB": BAR}


def test_what_is_not_planned_and_what_does_not_compile_is_said() -> None:
    large = {"memory_per_device": {"total": 90 * GIB, "available": 79 * GIB}, "largest": []}
    text = page({"not_planned": "64 does not divide 8 <devices>", "compiled": large})
    assert "<p>training not planned: 64 does not divide 8 &lt;devices&gt;</p>" in text
    (told,) = (x for x in _pictures(text)[0].iter("text") if x.get("class") == "bad")
    assert told.text == "11.0 GiB more than its 79.0 GiB"


def test_what_a_plan_lacks_is_left_out() -> None:
    text = page({"topology": "v5p:4x4x4", "mfu": 0.5})
    assert "<svg" not in text and "<section" not in text
    assert text.count("<dd>") == 1
