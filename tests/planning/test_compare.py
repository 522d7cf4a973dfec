"""Two plans side by side."""

import json
from pathlib import Path

import pytest

from moe_jax.config import UserError
from moe_jax.planning.compare import lines

A = {
    "topology": "h100:256x8",
    "memory_per_device": {"total": 64 * 2**30, "by_kind": {"parameters": 2**30, "optimizer": 7}},
    "parameters": {"total": 671026419200},
    "step_seconds": 20.5,
    "bounds": [1.0, 2.0],
    "alternatives": [{"mfu": 0.1}],
    "mesh": {"a_name_that_goes_on_and_on_until_it_is_too_long": 1},
}


def _files(folder: Path, a: object, b: object) -> tuple[Path, Path]:
    files = folder / "a.json", folder / "b.json"
    for file, plan in zip(files, (a, b), strict=True):
        file.write_text(json.dumps(plan))
    return files


def test_changed_figures_and_their_ratios(tmp_path: Path) -> None:
    b = json.loads(json.dumps(A))
    b["topology"] = "tpu7x:8x16x16:long name"
    b["memory_per_device"]["total"] = 48 * 2**30
    del b["memory_per_device"]["by_kind"]["optimizer"]
    b["step_seconds"] = 41
    b["parameters"]["total"] = 0
    b["bounds"][1] = 5000.0
    b["alternatives"].insert(0, {"mfu": 0.2})
    b["serving"] = {"decode": {"sequences": 31, "seconds": {"memory": 0.5}}, "shape": [1, 2]}
    b["mesh"] = {"a_name_that_goes_on_and_on_until_it_is_too_long": 2}
    told = lines(*_files(tmp_path, A, b))
    rows = [line.split() for line in told[4:]]
    assert rows == [
        ["topology", "h100:256x8", "tpu7x:8x16x1..."],
        ["memory_per_device.total", "64.0", "GiB", "48.0", "GiB", "0.75x"],
        ["memory_per_device.by_kind.optimizer", "7", "B", "-"],
        ["parameters.total", "671.0B", "0", "0x"],
        ["step_seconds", "20.5", "41", "2x"],
        ["bounds.1", "2", "5.0K", "2.5e+03x"],
        ["...goes_on_and_on_until_it_is_too_long", "1", "2", "2x"],
        ["serving.decode.sequences", "-", "31"],
        ["serving.decode.seconds.memory", "-", "0.5"],
        ["serving.shape.0", "-", "1"],
        ["serving.shape.1", "-", "2"],
    ]
    assert max(map(len, told[3:])) <= 80


def test_plans_that_are_the_same_and_files_that_are_none(tmp_path: Path) -> None:
    a, b = _files(tmp_path, A, A)
    assert lines(a, b) == [f"{a} and {b} plan the same"]
    b.write_text("[1]")
    with pytest.raises(UserError, match="b.json is no JSON object"):
        lines(a, b)
