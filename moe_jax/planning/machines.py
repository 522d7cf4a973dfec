"""What machines can do: those of `machines.toml`, a user's own, and the CPU here, measured."""

import difflib
import math
import os
import re
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import UserError

TABLE = Path(__file__).with_name("machines.toml")


class Machine(NamedTuple):
    """One device, as JAX counts devices; `machines.toml` says what each field means."""

    name: str
    operations: Mapping[str, float]
    memory: float
    memory_bandwidth: float
    fast_links: float
    fast_domain: int | None = None
    slow_links: float = 0.0
    host_links: float = 0.0
    watts: float | None = None
    device_kind: str = ""
    devices_per_chip: int = 1
    source: str = ""

    @property
    def platform(self) -> str:
        """Whose back ends programs for it take."""
        if self.name == "cpu":
            return "cpu"
        return "tpu" if self.device_kind.startswith("TPU") else "gpu"

    def rate(self, dtype: str) -> float:
        """Operations a second; what the device has no units for runs as bfloat16.

        Args:
          dtype: of JAX ("float8_e4m3fn") or of the table ("float8").
        """
        fitting = [name for name in self.operations if dtype.startswith(name)]
        return self.operations[max(fitting, key=len, default="bfloat16")]


class Topology(NamedTuple):
    """Devices and how they are joined.

    domain: devices that fast links join.
    """

    machine: Machine
    devices: int
    domain: int
    name: str


def read(file: Path = TABLE) -> dict[str, Machine]:
    """The machines of a file, by name.

    Raises:
      UserError: the file cannot be read, or a machine lacks a figure or has one too many.
    """
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no list of machines: {error}") from None
    if not tables:
        raise UserError(f"{file} holds no machine: each begins with its name in brackets")
    for name, figures in tables.items():
        if not isinstance(figures, dict) or name in Machine._fields:
            raise UserError(f"{file}: {name} stands before any machine's name in brackets")
    return {name: _machine(f"{file}: [{name}]", name, tables[name]) for name in tables}


def _machine(place: str, name: str, figures: dict[str, Any]) -> Machine:
    needed = ("operations", "memory", "memory_bandwidth", "fast_links")
    known = {*needed, *Machine._field_defaults}
    for field in needed:
        if field not in figures:
            raise UserError(f"{place} lacks {field}; a machine has at least {', '.join(needed)}")
    operations = figures["operations"]
    if not isinstance(operations, dict) or "bfloat16" not in operations:
        raise UserError(f"{place}: operations must name bfloat16, as in {{ bfloat16 = 1e12 }}")
    rates = {f"operations.{dtype}": rate for dtype, rate in operations.items()}
    optional = ("slow_links", "host_links")  # there may be none: 0
    for field, value in {**figures, **rates}.items():
        whole = field in ("fast_domain", "devices_per_chip")
        if field not in known | set(rates):
            raise UserError(f"{place} has an unknown field {field}{_near(field, known)}")
        if field in ("device_kind", "source"):
            if not isinstance(value, str):
                raise UserError(f"{place}: {field} = {value!r} must be a text")
        elif field != "operations":
            number = type(value) in ((int,) if whole else (int, float)) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and field not in optional):
                kind = "whole number" if whole else "number"
                raise UserError(f"{place}: {field} = {value!r} must be a {kind} above 0")
    return Machine(**{"name": name, "device_kind": name, **figures})


def parse(text: str, machines: Mapping[str, Machine] | None = None) -> Topology:
    """A topology from its name.

    Args:
      text: "v5p:8x16x16", chips of a TPU slice; "h800:256x8", hosts and devices of each; "cpu:8",
        devices that share this machine, which is measured here and now.
      machines: of `read`; the table's if None.
    Raises:
      UserError: no such machine, or a shape that is none.
    """
    machines = read() if machines is None else machines
    name, _, shape = text.partition(":")
    if name != "cpu" and name not in machines:
        near = _near(name, [*machines, "cpu"])
        raise UserError(f"topology {text}: no machine is called {name!r}{near}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(
            f"topology {text}: {name} needs a shape after a colon, such as v5p:8x16x16 (chips) or "
            "h100:256x8 (hosts and devices of each)"
        )
    sizes = [int(size) for size in shape.split("x")]
    devices = math.prod(sizes)
    if name == "cpu":
        return Topology(measured_cpu(devices), devices, devices, text)
    machine = machines[name]
    if machine.fast_domain is None:
        devices *= machine.devices_per_chip
        return Topology(machine, devices, devices, text)
    if len(sizes) > 2 or sizes[-1] > machine.fast_domain:
        raise UserError(
            f"topology {text}: fast links join at most {machine.fast_domain} devices of {name}; "
            f"write hosts x devices of each, such as {name}:4x{machine.fast_domain}"
        )
    if len(sizes) == 2 and sizes[0] > 1 and not machine.slow_links:
        raise UserError(f"topology {text}: no links join hosts of {name}; its slow_links are 0")
    return Topology(machine, devices, sizes[-1], text)


def of_device_kind(kind: str) -> Machine | None:
    """The machine of the table whose devices JAX calls so: the longest beginning that fits."""
    fitting = [m for m in read().values() if kind.startswith(m.device_kind)]
    return max(fitting, key=lambda machine: len(machine.device_kind), default=None)


def peak_operations(devices: Sequence[jax.Device], dtype: jnp.dtype) -> tuple[float, str]:
    """Operations per second of all `devices` together, and where the number comes from.

    Of a machine in the table, those in bf16. Others, CPUs among them, are measured by a matrix
    product on one device. Emulated CPU devices share the machine, so the figure of one is that of
    all.
    """
    machine = of_device_kind(devices[0].device_kind)
    if machine:
        per_device = machine.operations["bfloat16"]
        return per_device * len(devices), f"{per_device / 1e12:.0f} TFLOP/s bf16 a device"
    measured = _measure(jax.local_devices()[0], dtype)
    hosts = len({device.process_index for device in devices})
    count = hosts if devices[0].platform == "cpu" else len(devices)
    return measured * count, f"{measured / 1e9:.0f} GFLOP/s measured, {dtype.name} product"


def measured_cpu(devices: int) -> Machine:
    """This machine, as so many emulated devices that share it."""
    cpu = jax.local_devices(backend="cpu")[0]
    operations = {
        name: _measure(cpu, jnp.dtype(name)) / devices for name in ("float32", "bfloat16")
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    block = np.ones(2**25, np.float32)
    # A copy reads and writes; what emulated devices send one another is copied as well.
    bandwidth = 2 * block.nbytes / _fastest(block.copy) / devices
    return Machine(
        "cpu", operations, memory, bandwidth, bandwidth / 2, device_kind="cpu", source="measured"
    )


def _measure(device: jax.Device, dtype: jnp.dtype, size: int = 1024) -> float:
    """Operations per second of the best of a few matrix products."""
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    return 2 * size**3 / _fastest(lambda: product(x, x).block_until_ready())


def _fastest(run: Any, repeats: int = 5) -> float:
    """Seconds of the quickest of a few calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), sorted(names), n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(sorted(names))}"
