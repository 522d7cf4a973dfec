"""The start before JAX's start. What needs a fresh back end runs in processes of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moe_jax import platform
from moe_jax.config import MeshConfig, UserError

ROOT = Path(platform.__file__).parents[1]

ONE_PROCESS = """
import os
import jax
from moe_jax import platform
from moe_jax.config import MeshConfig

print(platform.start(MeshConfig(num_cpu_devices=4)))
print(os.environ["XLA_FLAGS"])
print(jax.device_count(), jax.process_count(), jax.numpy.ones(3).sum())
"""

ONE_OF_TWO = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moe_jax import platform
from moe_jax.config import MeshConfig

lines = platform.start(MeshConfig(num_cpu_devices=4), sys.argv[1], 2, int(sys.argv[2]))
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
x = jax.make_array_from_callback(
    (4,), NamedSharding(mesh, P("data")), lambda index: np.arange(1.0, 5.0, dtype=np.float32)[index]
)
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, out_specs=P()))(x)
print(lines, jax.process_index(), jax.local_device_count(), jax.device_count(), float(total[0]))
"""


def _popen(code: str, *args: str, xla_flags: str = "") -> subprocess.Popen[str]:
    """Starts `code` on CPU and outside of any cluster, wherever the tests themselves run."""
    clusters = ("SLURM_", "OMPI_", "KUBERNETES_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(clusters)}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _output(process: subprocess.Popen[str]) -> str:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


def test_one_process_emulates_devices_and_xla_knows_our_flags() -> None:
    # Every build of XLA knows all of XLA_FLAGS and ends the process at an unknown one.
    first, *others = platform.XLA_CPU_FLAGS
    flags = f"--{first}=60 " + platform.missing_flags(platform.XLA_GPU_FLAGS, "")
    added = " ".join(f"--{name}={platform.XLA_CPU_FLAGS[name]}" for name in others)
    process = _popen(ONE_PROCESS, xla_flags=flags)
    assert _output(process).splitlines() == [
        "['platform: cpu, 4 emulated devices']",
        f"{added} {flags}",
        "4 1 3.0",
    ]


def test_two_processes_share_the_devices_and_add_up() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [_popen(ONE_OF_TWO, address, str(i)) for i in range(2)]
    for i, process in enumerate(processes):
        assert _output(process).splitlines()[-1] == (
            f"['platform: cpu, 4 emulated devices', 'processes: 2'] {i} 2 4 10.0"
        )


@pytest.mark.parametrize(
    "arguments",
    [("host:1", None, None), ("host:1", 2, None), (None, 2, 0), (None, None, 0)],
)
def test_only_some_of_the_three_arguments_is_an_error(
    arguments: tuple[str | None, int | None, int | None],
) -> None:
    with pytest.raises(ValueError, match="must be given together; give all three or none"):
        platform.start(MeshConfig(), *arguments)


@pytest.mark.parametrize(
    ("num_processes", "process_id"), [(0, 0), (-1, 0), (1, 3), (2, 2), (2, -1)]
)
def test_a_process_that_is_not_of_the_run_is_an_error(num_processes: int, process_id: int) -> None:
    match = f"process_id={process_id} is not one of num_processes={num_processes} processes"
    with pytest.raises(UserError, match=match):
        platform.start(MeshConfig(), "host:1", num_processes, process_id)


@pytest.mark.parametrize("address", ["host", ":1", "host:", "host:port", ""])
def test_an_address_without_host_or_port_is_an_error(address: str) -> None:
    with pytest.raises(UserError, match=f"coordinator_address='{address}' is not .* host:port"):
        platform.start(MeshConfig(), address, 2, 0)


def test_devices_that_do_not_divide_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "choose_platform", lambda: "cpu")
    with pytest.raises(ValueError, match=r"num_cpu_devices=3 .* among 2 processes"):
        platform.start(MeshConfig(num_cpu_devices=3), "host:1", 2, 0)


def test_a_slurm_step_is_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    initialized = []
    monkeypatch.setattr(platform, "choose_platform", lambda: "cpu")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: initialized.append(args))
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    monkeypatch.setenv("XLA_FLAGS", "")
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "host[1-4]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    assert platform.start(MeshConfig(num_cpu_devices=4))[-1] == "processes: 4"
    assert initialized == [(None, None, None)]

    monkeypatch.setenv("SLURM_NTASKS", "1")  # a job of one process needs no one
    assert platform.start(MeshConfig(num_cpu_devices=4)) == ["platform: cpu, 4 emulated devices"]
    assert len(initialized) == 1


@pytest.mark.parametrize(
    ("chosen", "modules", "devices", "expected"),
    [
        ("", set(), {"/dev/nvidia[0-9]*"}, "cpu"),
        ("", {"libtpu", "jax_cuda13_plugin"}, set(), "cpu"),
        ("", {"libtpu", "jax_cuda13_plugin"}, {"/dev/nvidia[0-9]*"}, "cuda"),
        ("", {"jax_cuda12_plugin"}, {"/dev/nvidia[0-9]*"}, "cuda"),
        ("", {"libtpu"}, {"/dev/accel*"}, "tpu"),
        ("", {"libtpu"}, {"/dev/vfio/[0-9]*"}, "tpu"),
        ("cpu", {"jax_cuda13_plugin"}, {"/dev/nvidia[0-9]*"}, "cpu"),
        ("gpu,cpu", set(), set(), "cuda"),
        ("tpu,cpu", set(), set(), "tpu"),
    ],
)
def test_platform_is_chosen_by_the_user_or_by_device_and_plugin(
    chosen: str,
    modules: set[str],
    devices: set[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", chosen)
    monkeypatch.setattr(platform, "_installed", lambda module: module in modules)
    monkeypatch.setattr(platform.glob, "glob", lambda pattern: [pattern] * (pattern in devices))
    assert platform.choose_platform() == expected


@pytest.mark.parametrize("name", ["cuda", "tpu"])
def test_the_users_flags_win(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable, flags = platform.FLAGS[name]
    first, *others = flags
    monkeypatch.setattr(platform, "choose_platform", lambda: name)
    monkeypatch.setattr(platform, "_cluster_size", lambda: 1)
    monkeypatch.setenv(variable, f"--{first}=false --of_the_user=1")
    lines = platform.start(MeshConfig())

    added = " ".join(f"--{other}={flags[other]}" for other in others)
    assert os.environ[variable] == f"{added} --{first}=false --of_the_user=1"
    assert lines == [f"platform: {name}", f"{variable}: added {added}"]


def test_flags_in_a_file_are_left_alone() -> None:
    assert platform.missing_flags({"a": "true"}, "/etc/xla_flags.txt") == ""
