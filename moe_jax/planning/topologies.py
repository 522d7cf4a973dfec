"""Devices that are not here, to compile for.

TPU programs need `libtpu` (the extra `plan-tpu`), programs for NVIDIA GPUs `jax[cuda13]` (the extra
`plan-gpu`); neither needs a device. `prepare` comes before the first use of JAX in a process, and a
process compiles for one maker's devices.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from moe_jax.config import UserError

# libtpu looks for the machine it runs on, unless it is told. One process at a time may use it,
# but for compiling alone there may be several.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# What XLA wants to know of a Hopper GPU (SXM), from NVIDIA's data sheets and the CUDA programming
# guide; an H800 has an H100's chip.
DESCRIPTION = """
gpu_device_info {{
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""
_OF_H100 = {"memory": 84942979072, "bandwidth": 3352320000000}
HOPPER = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", **_OF_H100},
    "h800": {"name": "NVIDIA H800", **_OF_H100},
    "h200": {"name": "NVIDIA H200", "memory": 141000000000, "bandwidth": 4800000000000},
}
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_MISSING = (
    "to compile for {} its compiler must be here: pip install -e '.[{}]' (TPU and GPU in an "
    "environment each)"
)


def prepare() -> None:
    """Sets what libtpu and JAX read from the environment; what the user set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    # JAX can store programs for devices that are not there, and not read them again.
    jax.config.update("jax_enable_compilation_cache", False)


def check(name: str) -> None:
    """Raises UserError for a topology of machines that nothing compiles for."""
    kind = name.partition(":")[0]
    if kind not in (*HOPPER, *TPUS):
        raise UserError(f"nothing compiles for {kind}; it does for {', '.join((*HOPPER, *TPUS))}")


def devices(name: str) -> Sequence[Any]:
    """Compile-only devices.

    Args:
      name: of a TPU topology ("v5p:4x4x4", "v6e:8x8", "tpu7x:4x4x4": chips), or "h100:8x8", hosts
        times GPUs of one.
    Raises:
      UserError: the compiler is not installed, or knows no such topology.
    """
    check(name)
    kind, _, shape = name.partition(":")
    try:
        if kind in HOPPER:
            shape = shape if "x" in shape else f"1x{shape}"
            description = topologies.get_topology_desc(
                kind,
                "cuda",
                topology=f"1x{shape}",
                target_config=DESCRIPTION.format_map(HOPPER[kind]),
            )
        else:
            description = topologies.get_topology_desc(topology_name=name, platform="tpu")
    except NotImplementedError:
        raise UserError(_MISSING.format(name, "plan-gpu")) from None
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(_MISSING.format(name, "plan-tpu")) from None
        reason = str(error).splitlines()[0]
        raise UserError(f"the compiler refuses {name}: {reason}") from None
    return description.devices
