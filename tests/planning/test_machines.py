"""The table of machines, topologies by name, and peak operations per second."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import UserError
from moe_jax.planning import machines

NAMES = "v4 v5e v5p v6e tpu7x a100 h100 h800 h200 b200 gb200 rtx4090 mi300x groq"
FIVE_LINES = """
[mine]
operations = { bfloat16 = 100e12, float8 = 200e12 }
memory = 48e9
memory_bandwidth = 1e12
fast_links = 32e9
"""


def _devices(kind: str, count: int, platform: str = "gpu", processes: int = 1) -> Any:
    return [
        SimpleNamespace(device_kind=kind, platform=platform, process_index=i % processes)
        for i in range(count)
    ]


def test_every_machine_of_the_table_names_a_source_and_has_sensible_figures() -> None:
    table = machines.read()
    assert list(table) == NAMES.split()
    for machine in table.values():
        assert machine.source
        # Nothing that is sold computes less than 100 or more than 1000 times what it can read,
        # save for SRAM; links are slower than memory, and those to the host slower still.
        ratio = machine.operations["bfloat16"] / machine.memory_bandwidth
        assert machine.name == "groq" or 100 < ratio < 1000, machine
        assert machine.host_links <= machine.fast_links < machine.memory_bandwidth, machine
        assert machine.slow_links < machine.fast_links, machine
        assert machine.name == "groq" or 10e9 < machine.memory < 300e9, machine


# The makers' ratios: FP8 at twice bf16's rate where there are units for it.
@pytest.mark.parametrize(("name", "ratio"), [("h800", 2), ("b200", 2), ("tpu7x", 2), ("a100", 1)])
def test_a_dtype_without_units_runs_as_bfloat16(name: str, ratio: float) -> None:
    machine = machines.read()[name]
    rate = machine.rate("float8_e4m3fn") / machine.rate("bfloat16")
    assert rate == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "devices", "domain"),
    [
        ("v5p:8x16x16", 2048, 2048),
        ("tpu7x:4x4x4", 128, 128),
        ("h800:256x8", 2048, 8),
        ("h100:4x4", 16, 4),
        ("h200:8", 8, 8),
        ("gb200:2x72", 144, 72),
    ],
)
def test_topologies_by_name(text: str, devices: int, domain: int) -> None:
    topology = machines.parse(text)
    assert (topology.devices, topology.domain, topology.name) == (devices, domain, text)
    assert topology.machine == machines.read()[text.partition(":")[0]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("v5:4x4", "no machine is called 'v5'; did you mean v5p or v5e"),
        ("H10:8", "no machine is called 'H10'; did you mean h100"),
        ("abacus", "no machine is called 'abacus'; there are a100, b200, cpu, gb200"),
        ("v5p", "v5p needs a shape after a colon, such as v5p:8x16x16"),
        ("v5p:4xx4", "v5p needs a shape"),
        ("h100:0x8", "h100 needs a shape"),
        ("h100:16", "fast links join at most 8 devices of h100; write hosts x devices of each"),
        ("h100:4x4x8", "such as h100:4x8"),
    ],
)
def test_topologies_that_are_none(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"topology {text}: ") as error:
        machines.parse(text)
    assert sentence in str(error.value)


def test_a_machine_of_five_lines(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(FIVE_LINES)
    topology = machines.parse("mine:4x2", machines.read(file))
    assert topology.machine.rate("float8_e4m3fn") == 200e12
    assert (topology.devices, topology.machine.memory) == (8, 48e9)
    file.write_text(f"{FIVE_LINES}fast_domain = 2\n")
    with pytest.raises(UserError, match="no links join hosts of mine; its slow_links are 0"):
        machines.parse("mine:4x2", machines.read(file))


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("memory = 48e9\n", "", "[mine] lacks memory; a machine has at least operations, memory,"),
        ("= 48e9", '= "48 GB"', "memory = '48 GB' must be a number above 0"),
        ("= 48e9", "= -1", "memory = -1 must be a number above 0"),
        ("= 48e9", "= inf", "memory = inf must be a number above 0"),
        ("bfloat16", "float16", "operations must name bfloat16"),
        ("100e12", "0", "operations.bfloat16 = 0 must be a number above 0"),
        ("fast_links", "fast_link = 1\nfast_links", "unknown field fast_link; did you mean fast_l"),
        ("fast_links", "fast_domain = 8.5\nfast_links", "fast_domain = 8.5 must be a whole number"),
        ("[mine]", "[mine", "is no list of machines"),
        ("[mine]", "", "stands before any machine's name"),
    ],
)
def test_files_that_hold_no_machine(tmp_path: Path, before: str, after: str, sentence: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(FIVE_LINES.replace(before, after))
    with pytest.raises(UserError) as error:
        machines.read(file)
    assert sentence in str(error.value)
    with pytest.raises(UserError, match=r"missing.toml is no list of machines"):
        machines.read(tmp_path / "missing.toml")


def test_this_cpu_is_measured_and_shared() -> None:
    topology = machines.parse("cpu:8")
    machine = topology.machine
    assert (topology.devices, topology.domain, machine.source) == (8, 8, "measured")
    # Eight devices together do what a present-day CPU can.
    assert 1e9 < 8 * machine.rate("float32") < 1e14
    assert 1e9 < 8 * machine.memory_bandwidth < 1e12
    assert 5e8 < 8 * machine.memory < 1e14


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_is_measured_and_its_emulated_devices_share_it(dtype: str) -> None:
    peak, source = machines.peak_operations(jax.devices(), jnp.dtype(dtype))
    assert peak > 0
    assert source == f"{peak / 1e9:.0f} GFLOP/s measured, {dtype} product"


def test_what_is_measured_counts_once_a_machine_or_once_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machines, "_measure", lambda device, dtype: 3e9)
    dtype = jnp.dtype("float32")
    text = "3 GFLOP/s measured, float32 product"
    assert machines.peak_operations(_devices("cpu", 8, "cpu", 2), dtype) == (6e9, text)
    assert machines.peak_operations(_devices("Unknown GPU", 8, "gpu", 2), dtype) == (24e9, text)


@pytest.mark.parametrize(
    ("kind", "per_device", "text"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, "989 TFLOP/s bf16 a device"),
        ("TPU v5 lite", 197e12, "197 TFLOP/s bf16 a device"),
        ("TPU v5", 459e12, "459 TFLOP/s bf16 a device"),
        ("TPU v5p", 459e12, "459 TFLOP/s bf16 a device"),
        ("TPU v4", 275e12, "275 TFLOP/s bf16 a device"),
    ],
)
def test_known_devices_by_the_longest_name_that_fits(
    kind: str, per_device: float, text: str
) -> None:
    devices = _devices(kind, 4)
    assert machines.peak_operations(devices, jnp.dtype("bfloat16")) == (4 * per_device, text)
