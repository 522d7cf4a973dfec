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


@dataclasses.dataclass(frozen=True)
class Fp8SwiGLU:
    """The same of silu(gate) * up, whose inputs, and not it, are kept for the backward pass.

    x has gate and up side by side: [..., 2 * inputs of the weight]. They are kept in eight bits,
    of which the backward pass makes its operand again (DeepSeek-V3, section 3.3.3).
    """

    recipe: Recipe

    def __call__(
        self, x: jax.Array, weight: jax.Array, num_in_dims: int, output_dtype: jnp.dtype
    ) -> jax.Array:
        assert num_in_dims == weight.ndim - 1 == 1, (num_in_dims, weight.shape)
        x_TH = x.reshape(-1, x.shape[-1])
        y_TB: Any = _swiglu_product(x_TH, weight, output_dtype, self.recipe)
        return y_TB.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _swiglu_product(
    x_TH: jax.Array, weight_AB: jax.Array, output_dtype: jnp.dtype, recipe: Recipe
) -> jax.Array:
    return _swiglu_forward(x_TH, weight_AB, output_dtype, recipe)[0]


def _swiglu_forward(x_TH, weight_AB, output_dtype, recipe):
    # The name lets a rematerialization policy keep it.
    kept = jax.tree.map(lambda a: checkpoint_name(a, "gate_up"), KEPT.quantize(x_TH, 1))
    y_TB = _forward(_hidden(x_TH), weight_AB, output_dtype, recipe)[0]
    return y_TB, (kept, weight_AB, x_TH[:0])


def _swiglu_backward(output_dtype, recipe, residuals, dy_TB):
    kept, weight_AB, like = residuals
    hidden_TA, pull_back = jax.vjp(_hidden, KEPT.dequantize(kept, 1, like.dtype))
    dhidden_TA, dweight_AB = _backward(output_dtype, recipe, (hidden_TA, weight_AB), dy_TB)
    return *pull_back(dhidden_TA), dweight_AB


_swiglu_product.defvjp(_swiglu_forward, _swiglu_backward)


def _hidden(x_TH: jax.Array) -> jax.Array:
    gate, up = jnp.split(x_TH, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _dot(a: jax.Array, b: jax.Array, dim_a: int, dim_b: int) -> jax.Array:
    """Summed over these dims, in float32."""
    dims = (((dim_a,), (dim_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
