"""benchmarks/gpu.py: its references, its cases, what it does when a part fails, and all of it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import gpu, gpu_products, gpu_shapes


def test_plain_products_are_those_of_each_tile_and_expert():
    experts, dim_a, dim_b, size = 3, 8, 16, gpu_products.TILE_SIZE
    rng = np.random.default_rng(0)
    tiles, used = gpu_products.tiles_of([2 * size - 5, 0, 1], num_tiles=5)
    assert (tiles.tolist(), int(used)) == ([0, 0, 2, 2, 2], 3)
    x = rng.normal(size=(5 * size, dim_a)).astype(np.float32)
    y = rng.normal(size=(5 * size, dim_b)).astype(np.float32)
    w = rng.normal(size=(experts, dim_a, dim_b)).astype(np.float32)
    forward = gpu_products.plain_gmm(x, w, tiles, used)
    backward = gpu_products.plain_gmm(y, w, tiles, used, transpose_weights=True)
    weights = gpu_products.plain_tgmm(x, y, tiles, used, experts)
    first, last = slice(0, 2 * size), slice(2 * size, 3 * size)
    close = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(forward[first], x[first] @ w[0], **close)
    np.testing.assert_allclose(forward[last], x[last] @ w[2], **close)
    np.testing.assert_allclose(backward[last], y[last] @ w[2].T, **close)
    expected = np.stack([x[first].T @ y[first], 0 * w[1], x[last].T @ y[last]])
    np.testing.assert_allclose(weights, expected, **close)


@pytest.mark.parametrize("case", gpu_shapes.CASES[False])
def test_routings_of_a_case_have_its_rows_in_its_tiles(case):
    for routing in gpu_shapes.ROUTINGS:
        rows_E = gpu_shapes.rows_of_experts(case, routing)
        assert (len(rows_E), sum(rows_E)) == (case.experts, case.rows)
        skewed = max(rows_E) > 2 * min(rows_E)
        assert skewed == (routing == "real (Zipf)")
        num_tiles = case.rows // gpu_products.TILE_SIZE + case.experts
        assert gpu_products.tiles_of(rows_E, num_tiles)[1] <= num_tiles


def test_a_part_that_takes_too_long_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS", 0)
    assert gpu.Parts(quick=True).run("a part", sys.executable, "benchmarks.gpu_checks") is None
    assert capsys.readouterr().out == "a part: left out: it was not done in 1 seconds\n"


def test_a_part_that_fails_is_left_out_with_its_last_line(capsys):
    parts = gpu.Parts(quick=True)
    assert parts.run("a part", sys.executable, "benchmarks.no_such_part") is None
    assert parts.run("another", "/no/such/python", "benchmarks.gpu_checks") is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a part: left out: ") and "no_such_part" in lines[0]
    assert lines[1].startswith("another: left out: ") and "/no/such/python" in lines[1]
    assert set(parts.results) == {"a part", "another"}


def test_a_failed_check_and_checks_that_did_not_run_fail(capsys):
    good = {"check": "a", "error": 1e-3, "allowed": 1e-2, "passed": True}
    assert gpu.report_checks([good])
    assert not gpu.report_checks([good, {**good, "error": 1e-1, "passed": False}])
    assert not gpu.report_checks([good, {"check": "b", "error": "ValueError: x", "passed": False}])
    assert not gpu.report_checks(None)
    assert "FAILED b: ValueError: x" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_runs_on_tiny_shapes(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", f"--json={file}"]
    # A Python without torch: peers are left out, and that is no failure.
    command += ["--peer-python", "/no/such/python"]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert all(check["passed"] for check in figures["checks"])
    assert len(figures["products"]["products"]) == 12
    assert set(figures["step"]["seconds"]) == {"balance forced", "real (the router's)"}
    assert "left out" in figures["torch's products"]
    assert len(figures["fp8"]["checks"]) == 6 and len(figures["fp8"]["times"]) == 7
    assert all(check["passed"] for check in figures["fp8"]["checks"])
    for words in ("of rate", "balance forced", "real (Zipf)", "MFU", "floor", "quantising"):
        assert words in done.stdout
