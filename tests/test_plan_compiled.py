"""`plan --compile` for a TPU that is not here (`pytest -m aot`)."""

import json
import re
from pathlib import Path

import pytest
from plan_command import run

pytestmark = pytest.mark.aot

TINY = ("--config=configs/tiny.py", "--topology=v5e:2x4", "--compile")


def test_the_compiled_step_beside_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = run(*TINY, f"--json={file}", "--config.model.moe.buffer_factor=1.0")
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    plan = json.loads(file.read_text())
    compiled, by_kind = plan["compiled"], plan["memory_per_device"]["by_kind"]
    state = by_kind["parameters"] + by_kind["optimizer"]
    # A small model's arrays are padded to a TPU's tiles, and its attention to whole blocks.
    assert state < compiled["memory_per_device"]["state"] < 2.5 * state
    flops, tokens = plan["flops_per_token"], plan["batch"]["tokens_per_step"] / plan["devices"]
    planned = (flops["training"] + flops["recomputed"]) * tokens
    assert planned < compiled["flops"] < 1.5 * planned
    assert {"all-gather", "ragged-all-to-all", "reduce-scatter"} <= set(compiled["collectives"])
    assert compiled["compile_seconds"] > 0 and compiled["bytes_accessed"] > 0
    sizes = [buffer["bytes"] for buffer in compiled["largest"]]
    assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True)


def test_a_step_that_does_not_fit_is_an_answer() -> None:
    done = run(*TINY, "--config.training.tokens_per_step=67108864")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"does not fit: [\d.]+ GiB on a device; planned [\d.]+ GiB\n +[\d.]+ GiB more", done.stdout
    )
    _, _, largest = done.stdout.partition("largest buffers:")
    assert len(re.findall(r"GiB  \w+\[", largest)) == 3
