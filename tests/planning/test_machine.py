"""Peak operations per second."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_jax.planning import machine


def _devices(kind: str, count: int, platform: str = "gpu", processes: int = 1) -> Any:
    return [
        SimpleNamespace(device_kind=kind, platform=platform, process_index=i % processes)
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_is_measured_and_its_emulated_devices_share_it(dtype: str) -> None:
    peak, source = machine.peak_operations(jax.devices(), jnp.dtype(dtype))
    assert peak > 0
    assert source == f"{peak / 1e9:.0f} GFLOP/s measured, {dtype} product"


def test_what_is_measured_counts_once_a_machine_or_once_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_measure", lambda device, dtype: 3e9)
    dtype = jnp.dtype("float32")
    text = "3 GFLOP/s measured, float32 product"
    assert machine.peak_operations(_devices("cpu", 8, "cpu", 2), dtype) == (6e9, text)
    assert machine.peak_operations(_devices("Unknown GPU", 8, "gpu", 2), dtype) == (24e9, text)


@pytest.mark.parametrize(
    ("kind", "per_device", "text"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, "989 TFLOP/s bf16 a device"),
        ("TPU v5 lite", 197e12, "197 TFLOP/s bf16 a device"),
        ("TPU v5", 459e12, "459 TFLOP/s bf16 a device"),
        ("TPU v4", 275e12, "275 TFLOP/s bf16 a device"),
    ],
)
def test_known_devices_by_the_longest_name_that_fits(
    kind: str, per_device: float, text: str
) -> None:
    devices = _devices(kind, 4)
    assert machine.peak_operations(devices, jnp.dtype("bfloat16")) == (4 * per_device, text)
