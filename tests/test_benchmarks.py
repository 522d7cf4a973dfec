"""Benchmarks that no other test runs still fit the code that they measure."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = sorted(path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_finds_all_that_it_imports(name):
    importlib.import_module(f"benchmarks.{name}")
