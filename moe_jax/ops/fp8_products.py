"""Products whose operands have eight bits, with custom gradients (DeepSeek-V3, section 3.3).

Each of a layer's three products quantises its own operands along the dim that it sums over: the
input's gradient takes dy in tiles along the result's dim, and the weight's gradient takes x and dy
in tiles along rows. Sums are float32.

Shapes: T rows, A a weight's inputs, B its results, E experts, S slots.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.fp8_recipes import KEPT, Recipe


@dataclasses.dataclass(frozen=True)
class Fp8Product:
    """A `weight_product.Product` by a recipe."""

    recipe: Recipe

    def __call__(
        self, x: jax.Array, weight: jax.Array, num_in_dims: int, output_dtype: jnp.dtype
    ) -> jax.Array:
        rows, out_dims = x.shape[: x.ndim - num_in_dims], weight.shape[num_in_dims:]
        inputs = math.prod(weight.shape[:num_in_dims])
        x_TA, weight_AB = x.reshape(-1, inputs), weight.reshape(inputs, -1)
        y_TB: Any = _product(x_TA, weight_AB, output_dtype, self.recipe)
        return y_TB.reshape(*rows, *out_dims)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(
    x_TA: jax.Array, weight_AB: jax.Array, output_dtype: jnp.dtype, recipe: Recipe
) -> jax.Array:
    return _forward(x_TA, weight_AB, output_dtype, recipe)[0]


def _forward(x_TA, weight_AB, output_dtype, recipe):
    x, weight = recipe.activation.rounded(x_TA, 1), recipe.weight.rounded(weight_AB, 0)
    return _dot(x, weight, 1, 0).astype(output_dtype), (x_TA, weight_AB)


def _backward(output_dtype, recipe, kept, dy_TB):
    del output_dtype
    x_TA, weight_AB = kept
    dy, weight = recipe.gradient.rounded(dy_TB, 1), recipe.weight.rounded(weight_AB, 1)
    dx_TA = _dot(dy, weight, 1, 1).astype(x_TA.dtype)
    # As DeepSeek has it, x is turned over from eight bits: scaled anew along the other dim.
    x = recipe.activation.rounded(recipe.activation.rounded(x_TA, 1), 0)
    return dx_TA, _dot(x, recipe.gradient.rounded(dy_TB, 0), 0, 0)


_product.defvjp(_forward, _backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up: [..., F]. Both are kept in eight bits, and the gradient is of these."""
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    kept = [KEPT.quantize(x, x.ndim - 1) for x in (gate, up)]
    # The name lets a rematerialization policy keep them.
    kept = jax.tree.map(lambda a: checkpoint_name(a, "gate_up"), kept)
    return jax.nn.silu(gate) * up, (kept, gate[..., :0])


def _swiglu_backward(residuals, d_hidden):
    kept, like = residuals
    gate, up = (KEPT.dequantize(x, x.values.ndim - 1, like.dtype) for x in kept)
    return jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)[1](d_hidden)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _dot(a: jax.Array, b: jax.Array, dim_a: int, dim_b: int) -> jax.Array:
    """Summed over these dims, in float32."""
    dims = (((dim_a,), (dim_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
