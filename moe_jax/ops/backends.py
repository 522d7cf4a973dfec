"""Which form of an operation is compiled.

It follows the devices that are compiled for, which the current mesh knows, and not the machine that
compiles.
"""

import jax

from moe_jax.config import BACKENDS


def choose(operation: str, wanted: str) -> str:
    """The form that is wanted, or for "auto" that of the platform of the mesh's devices."""
    return BACKENDS[operation][mesh_platform()] if wanted == "auto" else wanted


def mesh_platform() -> str:
    """Of the current mesh's devices: "cpu", "tpu" or "gpu"; "cpu" for a mesh without any."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "cpu" if device is None else device.platform
