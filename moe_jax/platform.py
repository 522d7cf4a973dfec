"""What must be set before JAX's back end starts: the platform, XLA's flags, the other processes.

`start` is called once, first of all, by every command that computes. It never starts a back end
itself: the flags and the number of emulated devices can no longer be changed after that.
"""

import glob
import importlib.util
import logging
import os
from collections.abc import Mapping

import jax
from jax._src.clusters import ClusterEnv  # the only way to learn a cluster's size beforehand

from moe_jax.config import MeshConfig, UserError

# Flags that hide communication behind computation. All of them are known to XLA in JAX 0.10.2 and
# 0.12 (to libtpu 0.0.42 and 0.0.50): an unknown flag ends the process, so add none unchecked.
XLA_GPU_FLAGS = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    # Products of the same weight stay apart, so that one can run while the other's rows travel.
    "xla_gpu_dot_merger_threshold_mb": "0",
}
# How long a process may be silent until the others take it for dead, and leave as well.
DEATH_SECONDS = 30
# What runs beside the tensor core: exchanges by themselves, weights and gradients on the sparse
# cores. Fusing all-gathers with products instead is refused by libtpu 0.0.52 on v5p, v6e and TPU7x.
LIBTPU_FLAGS = {
    "xla_tpu_enable_async_all_to_all": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    # There a TPU7x would have it wait for gathers, with no product beside it.
    "xla_tpu_enable_sparse_core_collective_offload_ragged_all_to_all": "false",
}
# Emulated devices that share a busy machine's cores may wait long for each other. XLA would warn
# after 20 seconds and abort the process after 40.
XLA_CPU_FLAGS = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": "300",
    "xla_cpu_collective_call_terminate_timeout_seconds": "1800",
}
# The platform, the environment variable that its compiler reads, and our flags.
FLAGS = {
    "cpu": ("XLA_FLAGS", XLA_CPU_FLAGS),
    "cuda": ("XLA_FLAGS", XLA_GPU_FLAGS),
    "tpu": ("LIBTPU_INIT_ARGS", LIBTPU_FLAGS),
}


def start(
    mesh: MeshConfig,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> list[str]:
    """Prepares JAX for this machine and joins the other processes of the run, if there are any.

    The last three arguments are for a start by hand, and only all together; without them the
    processes are found where JAX knows the cluster (Slurm, Open MPI, JobSet, Cloud TPU).

    Args:
      mesh: its `num_cpu_devices`, the emulated devices of all processes together, is read on CPU.
      coordinator_address: "host:port" of process 0.
      num_processes: of the whole run.
      process_id: from 0 to num_processes - 1.

    Returns:
      Lines for a person about what was set.

    Raises:
      ValueError: only some of the three arguments are given, or they name no process of a run; or
        the emulated devices cannot be shared equally among the processes.
    """
    by_hand = (coordinator_address, num_processes, process_id)
    if None in by_hand and by_hand != (None, None, None):
        raise UserError(
            f"coordinator_address={coordinator_address}, num_processes={num_processes} and "
            f"process_id={process_id} must be given together; give all three or none"
        )
    if coordinator_address is None or num_processes is None or process_id is None:
        num_processes = _cluster_size()
    else:
        _check_by_hand(coordinator_address, num_processes, process_id)

    platform = choose_platform()
    lines = [f"platform: {platform}"]
    if platform == "cpu":
        local_devices = _local_cpu_devices(mesh.num_cpu_devices, num_processes)
        jax.config.update("jax_num_cpu_devices", local_devices)
        # Named, so that installed plugins of absent accelerators do not print their errors.
        jax.config.update("jax_platforms", "cpu")
        lines[0] += f", {mesh.num_cpu_devices} emulated devices"
    if platform in FLAGS:
        variable, flags = FLAGS[platform]
        added = missing_flags(flags, os.environ.get(variable, ""))
        if added:
            # In front: where a flag is given twice, the last one counts.
            os.environ[variable] = f"{added} {os.environ.get(variable, '')}".strip()
            if platform != "cpu":  # whose flags change no result and no speed
                lines.append(f"{variable}: added {added}")
    if num_processes > 1:
        # JAX would take SIGTERM for itself; `training/signals.py` answers it.
        jax.config.update("jax_enable_preemption_service", False)
        # It tells of each step of joining, and that this service is off.
        logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
        # On CPU the collectives between processes are Gloo's, which is JAX's default.
        jax.distributed.initialize(
            *by_hand,
            heartbeat_timeout_seconds=DEATH_SECONDS,
            shutdown_timeout_seconds=DEATH_SECONDS,
        )
        lines.append(f"processes: {num_processes}")
    return lines


def choose_platform() -> str:
    """The platform that JAX will run on ("cpu", "cuda", "tpu", ...), without starting it.

    What the user chose (`JAX_PLATFORMS`, of several the first) comes before what is found: an
    accelerator counts only if both its device and its plugin are there.
    """
    chosen = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if chosen:
        return "cuda" if chosen == "gpu" else chosen
    if _installed("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return "tpu"
    cuda = _installed("jax_cuda12_plugin") or _installed("jax_cuda13_plugin")
    if cuda and glob.glob("/dev/nvidia[0-9]*"):
        return "cuda"
    return "cpu"


def missing_flags(flags: Mapping[str, str], given: str) -> str:
    """Those of `flags` that `given`, the user's flags, does not set: "--a=true --b=true"."""
    if given and not given.lstrip().startswith("-"):
        return ""  # XLA takes it for the name of a file of flags; nothing can be added to that
    names = {flag.lstrip("-").split("=")[0] for flag in given.split()}
    return " ".join(f"--{name}={value}" for name, value in flags.items() if name not in names)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _check_by_hand(coordinator_address: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(
            f"coordinator_address={coordinator_address!r} is not an address of process 0; "
            "give host:port"
        )
    # A wrong number must not pass for a run of one process, which would train by itself.
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id={process_id} is not one of num_processes={num_processes} processes; "
            "number them from 0 to num_processes - 1"
        )


def _local_cpu_devices(num_cpu_devices: int, num_processes: int) -> int:
    if num_cpu_devices % num_processes:
        raise UserError(
            f"config.mesh.num_cpu_devices={num_cpu_devices} counts the devices of all processes "
            f"and cannot be shared equally among {num_processes} processes; set a multiple of it"
        )
    return num_cpu_devices // num_processes


def _cluster_size() -> int:
    """Processes in the cluster that JAX detects; 1 outside of any. Nothing is waited for."""
    # Whatever is given is not asked of the cluster, so that the size is the one thing asked.
    _, size, _, _ = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator_address="",
        num_processes=None,
        process_id=0,
        local_device_ids=[0],
        cluster_detection_method=None,
        initialization_timeout=0,
    )
    return size or 1
