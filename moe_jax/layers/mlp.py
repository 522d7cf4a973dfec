"""The dense feed-forward layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import PrecisionConfig
from moe_jax.layers.linear import Initializer, Linear, product_of
from moe_jax.ops.fp8_products import swiglu


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)): [..., dim] to [..., dim]."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        initializer: Initializer,
        precision: PrecisionConfig,
        rngs: nnx.Rngs,
    ):
        shared: dict[str, Any] = dict(
            initializer=initializer,
            dtype=jnp.dtype(precision.compute_dtype),
            product=product_of(precision, "mlp"),
            rngs=rngs,
        )
        self.in_fp8 = precision.recipe_of("mlp") != "none"
        self.gate = Linear((dim,), (hidden,), ("embed", None), **shared)
        self.up = Linear((dim,), (hidden,), ("embed", None), **shared)
        self.down = Linear((hidden,), (dim,), (None, "embed"), **shared)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.gate(x), self.up(x)
        return self.down(swiglu(gate, up) if self.in_fp8 else jax.nn.silu(gate) * up)
