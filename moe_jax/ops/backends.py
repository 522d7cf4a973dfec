"""Which form of an operation is compiled.

It follows the devices that are compiled for, which the current mesh knows, and not the machine that
compiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import BACKENDS, ModelConfig, UserError
from moe_jax.ops.fp8_recipes import Recipe


class Backends(NamedTuple):
    """Of each operation its form, as `config.BACKENDS` names them, and the precision of experts."""

    attention: str = "portable"
    grouped_matmul: str = "portable"
    exchange: str = "padded"
    recipe: Recipe | None = None  # of the experts' products; None: operands are as they come
    fp8_form: str = "auto"  # of `fp8_native.kernels`
    exchange_fp8: bool = False  # what goes to experts has eight bits


PORTABLE = Backends()


def choose(config: ModelConfig, dtype: jnp.dtype) -> Backends:
    """The forms that the config wants, or for "auto" those of the platform of the mesh's devices.

    Where a platform's kernels cannot take the model, "auto" means the portable form.

    Args:
      dtype: of the operands.
    Raises:
      ValueError: kernels are wanted that cannot take it.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = "cpu" if device is None else device.platform
    chosen = {}
    for operation, forms in BACKENDS.items():
        wanted = getattr(config.backends, operation)
        form = forms[platform][0] if wanted == "auto" else wanted
        obstacle = _obstacle(operation, form, config, dtype)
        if obstacle and wanted != "auto":
            raise UserError(
                f"the kernels of config.model.backends.{operation}={form!r} {obstacle}; 'portable' "
                "takes anything"
            )
        chosen[operation] = "portable" if obstacle else form
    return Backends(**chosen)


def _obstacle(operation: str, form: str, config: ModelConfig, dtype: jnp.dtype) -> str | None:
    # Imported where they are used: not every JAX has what the kernels import.
    if (operation, form) == ("grouped_matmul", "gpu"):
        from moe_jax.ops import grouped_matmul_gpu

        hidden = config.moe.intermediate_size
        return grouped_matmul_gpu.obstacle(dtype, [config.hidden_size, hidden, 2 * hidden])
    if (operation, form) == ("grouped_matmul", "tpu"):
        from moe_jax.ops import grouped_matmul_tpu

        return grouped_matmul_tpu.obstacle()
    if (operation, form) == ("attention", "gpu"):
        from moe_jax.ops import attention_gpu

        heads = config.attention
        if heads.kind == "latent":
            dims = heads.qk_nope_head_dim + heads.qk_rope_head_dim, heads.v_head_dim
        else:
            dims = heads.head_dim, heads.head_dim
        return attention_gpu.obstacle(dtype, *dims)
    return None
