"""The dense feed-forward layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import PrecisionConfig
from moe_jax.layers.linear import Initializer, Linear, product_of
from moe_jax.ops.fp8_products import Fp8SwiGLU
from moe_jax.ops.fp8_recipes import RECIPES


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
        self.recipe = RECIPES.get(precision.recipe_of("mlp"))
        self.gate = Linear((dim,), (hidden,), ("embed", "wide"), **shared)
        self.up = Linear((dim,), (hidden,), ("embed", "wide"), **shared)
        if self.recipe is not None:
            shared["product"] = Fp8SwiGLU(self.recipe, precision.fp8_report, precision.fp8_form)
        self.down = Linear((hidden,), (dim,), ("wide", "embed"), **shared)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.gate(x), self.up(x)
        if self.recipe is not None:
            return self.down(jnp.concatenate([gate, up], axis=-1))
        return self.down(jax.nn.silu(gate) * up)
