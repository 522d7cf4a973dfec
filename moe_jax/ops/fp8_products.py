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

from moe_jax.ops import fp8_native
from moe_jax.ops.fp8_native import kernels, unless_exact
from moe_jax.ops.fp8_recipes import KEPT, Recipe
from moe_jax.ops.fp8_state import of_operands, operand, over_devices


@dataclasses.dataclass(frozen=True)
class Fp8Product:
    """A `weight_product.Product` by a recipe.

    reports: its state's gradient says all of `fp8_state`.
    form: see `fp8_native.kernels`; a portable product rounds its operands and sums in float32.
    """

    recipe: Recipe
    reports: bool = False
    form: str = "auto"

    @property
    def has_state(self) -> bool:
        return self.reports or self.recipe.delayed

    def __call__(
        self,
        x: jax.Array,
        weight: jax.Array,
        num_in_dims: int,
        output_dtype: jnp.dtype,
        state: jax.Array | None,
    ) -> jax.Array:
        rows, out_dims = x.shape[: x.ndim - num_in_dims], weight.shape[num_in_dims:]
        inputs = math.prod(weight.shape[:num_in_dims])
        x_TA, weight_AB = x.reshape(-1, inputs), weight.reshape(inputs, -1)
        y_TB: Any = _product(x_TA, weight_AB, state, output_dtype, self)
        return y_TB.reshape(*rows, *out_dims)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(
    x_TA: jax.Array,
    weight_AB: jax.Array,
    state: jax.Array | None,
    output_dtype: jnp.dtype,
    how: Fp8Product,
) -> jax.Array:
    return _forward(x_TA, weight_AB, state, output_dtype, how)[0]


def _forward(x_TA, weight_AB, state, output_dtype, how):
    recipe, kept = how.recipe, (x_TA, weight_AB, state)

    def portable():
        x = operand(x_TA, recipe.activation, 1, _row(state, 0), recipe)
        weight = operand(weight_AB, recipe.weight, 0, _row(state, 1), recipe)
        return _dot(x, weight, 1, 0).astype(output_dtype)

    found = kernels(how.form, recipe, weight_AB.shape)
    if found is None:
        return portable(), kept
    native = functools.partial(
        fp8_native.dense, found, recipe, x_TA, weight_AB.astype(x_TA.dtype), output_dtype
    )
    return unless_exact(native, portable, state), kept


def _backward(output_dtype, how, kept, dy_TB):
    del output_dtype
    x_TA, weight_AB, state = kept
    recipe, rows = how.recipe, [_row(state, i) for i in range(3)]

    def portable():
        dy = operand(dy_TB, recipe.gradient, 1, rows[2], recipe)
        weight = operand(weight_AB, recipe.weight, 1, rows[1], recipe)
        dx_TA = _dot(dy, weight, 1, 1).astype(x_TA.dtype)
        # Not from the forward product's eight bits, as in the report: two roundings err by more.
        x = operand(x_TA, recipe.activation, 0, rows[0], recipe)
        return dx_TA, _dot(x, operand(dy_TB, recipe.gradient, 0, rows[2], recipe), 0, 0)

    def native(found):
        weight = weight_AB.astype(x_TA.dtype)
        dx_TA = fp8_native.dense(found, recipe, dy_TB, weight, x_TA.dtype, transpose_weights=True)
        return dx_TA, fp8_native.dense_weights(found, recipe, x_TA, dy_TB)

    found = kernels(how.form, recipe, weight_AB.shape)
    if found is None:
        dx_TA, dweight_AB = portable()
    else:
        dx_TA, dweight_AB = unless_exact(functools.partial(native, found), portable, state)
    reports = None
    if state is not None:
        operands = (x_TA, 1), (weight_AB, 0), (dy_TB, 1)
        reports = over_devices(of_operands(operands, state, recipe, whole=how.reports))
    return dx_TA, dweight_AB, reports


_product.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Fp8SwiGLU(Fp8Product):
    """The same of silu(gate) * up, whose inputs, and not it, are kept for the backward pass.

    x has gate and up side by side: [..., 2 * inputs of the weight]. They are kept in eight bits,
    of which the backward pass makes its operand again (DeepSeek-V3, section 3.3.3).
    """

    def __call__(
        self,
        x: jax.Array,
        weight: jax.Array,
        num_in_dims: int,
        output_dtype: jnp.dtype,
        state: jax.Array | None,
    ) -> jax.Array:
        assert num_in_dims == weight.ndim - 1 == 1, (num_in_dims, weight.shape)
        x_TH = x.reshape(-1, x.shape[-1])
        y_TB: Any = _swiglu_product(x_TH, weight, state, output_dtype, self)
        return y_TB.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _swiglu_product(
    x_TH: jax.Array,
    weight_AB: jax.Array,
    state: jax.Array | None,
    output_dtype: jnp.dtype,
    how: Fp8Product,
) -> jax.Array:
    return _swiglu_forward(x_TH, weight_AB, state, output_dtype, how)[0]


def _swiglu_forward(x_TH, weight_AB, state, output_dtype, how):
    # The name lets a rematerialization policy keep it.
    kept = jax.tree.map(lambda a: checkpoint_name(a, "gate_up"), KEPT.quantize(x_TH, 1))
    y_TB = _forward(_hidden(x_TH), weight_AB, state, output_dtype, how)[0]
    return y_TB, (kept, weight_AB, state, x_TH[:0])


def _swiglu_backward(output_dtype, how, residuals, dy_TB):
    kept, weight_AB, state, like = residuals
    hidden_TA, pull_back = jax.vjp(_hidden, KEPT.dequantize(kept, 1, like.dtype))
    kept = hidden_TA, weight_AB, state
    dhidden_TA, dweight_AB, reports = _backward(output_dtype, how, kept, dy_TB)
    return *pull_back(dhidden_TA), dweight_AB, reports


_swiglu_product.defvjp(_swiglu_forward, _swiglu_backward)


def _row(state: jax.Array | None, number: int) -> jax.Array | None:
    return None if state is None else state[number]


def _hidden(x_TH: jax.Array) -> jax.Array:
    gate, up = jnp.split(x_TH, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _dot(a: jax.Array, b: jax.Array, dim_a: int, dim_b: int) -> jax.Array:
    """Summed over these dims, in float32."""
    dims = (((dim_a,), (dim_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
