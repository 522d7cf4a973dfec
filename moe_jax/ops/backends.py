"""Which form of an operation is compiled.

It follows the devices that are compiled for, which the current mesh knows, and not the machine that
compiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import BACKENDS, ModelConfig


class Backends(NamedTuple):
    """Of each operation its form, as `config.BACKENDS` names them."""

    attention: str = "portable"
    grouped_matmul: str = "portable"
    exchange: str = "padded"


def choose(config: ModelConfig, dtype: jnp.dtype) -> Backends:
    """The forms that the config wants, or for "auto" those of the platform of the mesh's devices.

    Where the GPU's kernels of grouped products cannot take a model, "auto" means the portable ones.

    Args:
      dtype: of the operands.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = "cpu" if device is None else device.platform
    forms = {name: of_platform[platform][0] for name, of_platform in BACKENDS.items()}
    if forms["grouped_matmul"] == "gpu":
        from moe_jax.ops import grouped_matmul_gpu  # not every JAX has what it imports

        hidden = config.moe.intermediate_size
        dims = [config.hidden_size, hidden, 2 * hidden]
        if grouped_matmul_gpu.obstacle(dtype, dims):
            forms["grouped_matmul"] = "portable"
    wanted = {name: getattr(config.backends, name) for name in forms}
    return Backends(**{n: forms[n] if form == "auto" else form for n, form in wanted.items()})
