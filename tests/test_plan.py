"""The command: its text, its JSON, and its sentences for mistakes."""

import json
import re
from pathlib import Path

import pytest
from plan_command import run

V3 = "--config=configs/deepseek_v3.py"


def test_deepseek_v3_on_2048_chips(tmp_path: Path) -> None:
    file, html = tmp_path / "plan.json", tmp_path / "plan.html"
    done = run(
        V3,
        "--topology=v5p:8x16x16",
        f"--json={file}",
        f"--html={html}",
        "--price=2",
        "--tokens=14.8e12",
        "--context=131072",
    )
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert html.read_text().startswith("<!doctype html>")
    plan = json.loads(file.read_text())
    parameters = plan["parameters"]
    assert (parameters["total"], parameters["active"]) == (671_026_419_200, 37_552_282_624)
    assert sum(parameters["by_group"].values()) == parameters["total"]
    flops = plan["flops_per_token"]
    # DeepSeek's own count without prediction ahead: Insights into DeepSeek-V3, table 2.
    of_main = 3 * (flops["forward"] - flops["by_group"]["mtp"])
    assert of_main == pytest.approx(250e9, rel=0.01)
    assert flops["training"] == 3 * flops["forward"]
    memory, sent = plan["memory_per_device"], plan["communication_per_step"]
    for figures in (memory, sent):
        assert figures["total"] == pytest.approx(sum(figures["by_kind"].values()))
    assert memory["fits"] and memory["total"] < memory["capacity"]
    # Master weights and two moments of 682.6 B in 2,048 parts; embedding and routers in 32.
    table = 7168 * (129_280 + 59 * 256)
    others = 671_026_419_200 + parameters["mtp"] - table
    assert memory["by_kind"]["parameters"] == pytest.approx(
        4 * (others / 2048 + table / 32), rel=0.01
    )
    tokens = plan["batch"]["tokens_per_step"] / plan["devices"]
    assert plan["tokens_per_second_per_device"] == pytest.approx(tokens / plan["step_seconds"])
    assert plan["mfu"] == pytest.approx(
        plan["tokens_per_second_per_device"] * flops["training"] / 459e12
    )
    assert plan["device_hours"] == pytest.approx(
        14.8e12 / plan["tokens_per_second_per_device"] / 3600
    )
    assert plan["cost"] == pytest.approx(2 * plan["device_hours"])
    assert plan["serving"]["context"] == 131072


def test_without_a_topology_it_counts() -> None:
    done = run("--config=configs/tiny.py", "--document_length=64")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("parameters  1.8M in total, 886.5K per token\n")
    assert "attention to 64 tokens" in done.stdout
    assert "machine" not in done.stdout


def test_what_does_not_fit_comes_with_flags_that_do() -> None:
    tight = ("--topology=v5e:16x16", "--config=configs/deepseek_v2_lite.py")
    tight += ("--config.mesh.fsdp=1", "--config.mesh.data=256", "--config.mesh.expert=1")
    tight += ("--config.training.tokens_per_step=4194304", "--config.training.micro_batches=1")
    tight += ("--config.data.num_streams=256",)
    done = run(*tight)
    assert done.returncode == 0, done.stderr
    assert "does not fit" in done.stdout
    told = done.stdout[done.stdout.index("what fits, the fastest first") :].splitlines()
    flags = [flag for line in told[2:5] for flag in line.split()]
    assert len(flags) == 6
    again = run(*tight, *flags)
    assert again.returncode == 0, again.stderr
    assert "; fits" in again.stdout


def test_machines_that_serve_a_context() -> None:
    done = run(V3, "--context=1000000")
    assert done.returncode == 0, done.stderr
    lines = done.stdout[done.stdout.index("at 1,000,000") :].splitlines()
    assert any(re.match(r"h200 +8 +\d+ +\d", line) for line in lines)
    assert max(map(len, lines)) <= 80


def test_serving_on_devices_that_the_mesh_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = run(V3, "--topology=h200:1x8", "--context=4096", f"--json={file}")
    assert done.returncode == 0, done.stderr
    told = "training not planned: config.mesh (fsdp=-1 * expert=64) does not fit 8 devices: 64 does"
    assert f"\n{told} not divide them" in done.stdout
    assert re.search(r"\nserving +h200:1x8, context 4,096\n", done.stdout)
    plan = json.loads(file.read_text())
    assert plan["serving"]["sequences"] > 0 and "step_seconds" not in plan


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            (V3, "--topology=v5q:8x16x16"),
            "topology v5q:8x16x16: no machine is called 'v5q'; did you mean v5p or v5e?",
        ),
        (
            (V3, "--topology=h100:1x8"),
            "config.mesh (fsdp=-1 * expert=64) does not fit 8 devices: 64 does not divide them",
        ),
        (
            (V3, "--topology=h800:512x8"),
            "the 2048 rows of a micro-batch in config.data.stages[0]",
        ),
        ((V3, "--topology=v5p:8x16x16", "--tokens=nan"), "--tokens=nan must be a number from 1 on"),
        ((V3, "--price=inf"), "--price=inf must be a number from 0 on"),
        ((V3, "--context=0"), "--context=0 must be a number from 1 on"),
        ((V3, "--json=/nowhere/a.json"), "--json=/nowhere/a.json cannot be written"),
        (
            (V3, "--topology=v5p:8x16x16", "--compile", "--document_length=8"),
            "--compile counts whole rows; leave out --document_length",
        ),
        ((V3, "--links=0"), "--links=0 is a share and must be above 0, and at most 1"),
        ((V3, "--tokens=0"), "--tokens=0 must be a number from 1 on"),
        ((V3, "--price=-1"), "--price=-1 must be a number from 0 on"),
        ((V3, "--compile"), "--compile needs --topology, such as --topology=v5p:8x16x16"),
        (
            ("--config=configs/tiny.py", "--topology=a100:1x8", "--compile"),
            "nothing compiles for a100; it does for h100, h800, h200, v4, v5e, v5p, v6e, tpu7x",
        ),
        (
            (V3, "--topology=h100:1x8", "--context=4096", "--search"),
            "config.mesh (fsdp=-1 * expert=64) does not fit 8 devices: 64 does not divide them",
        ),
        ((V3, "--price=2"), "--price needs --topology, such as --topology=v5p:8x16x16"),
        ((V3, "extra"), "'extra' is no flag; flags begin with --"),
        ((), "--config is missing; try --config=configs/tiny.py"),
        (("--compare", "a.json"), "two files are compared, as in --compare A.json B.json"),
        (("--compare", "a.json", "b.json", "c.json"), "'c.json' is no flag"),
    ],
)
def test_mistakes(flags: tuple[str, ...], sentence: str) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sentence}")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
