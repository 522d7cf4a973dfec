"""The dense feed-forward layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.linear import Linear


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)): [..., dim] to [..., dim]."""

    def __init__(self, dim: int, hidden: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        wide: dict[str, Any] = dict(logical_axes=("embed", None), std=std, dtype=dtype, rngs=rngs)
        self.gate = Linear((dim,), (hidden,), **wide)
        self.up = Linear((dim,), (hidden,), **wide)
        self.down = Linear((hidden,), (dim,), (None, "embed"), std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
