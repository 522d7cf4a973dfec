"""The product of activations with a weight that is stored in parts, in float32."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_jax import sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def weight_product(
    x: jax.Array,
    weight: jax.Array,
    num_in_dims: int,
    dtype: jnp.dtype,
    output_dtype: jnp.dtype,
) -> jax.Array:
    """x times the whole weight: [..., *in_dims] and [*in_dims, *out_dims] to [..., *out_dims].

    Operands are `dtype`, and only that narrow form of the weight travels. The weight's gradient is
    summed in float32, over the devices as well, and comes out split as the weight is.

    Args:
      x: [..., *in_dims] `dtype`, rows split over the batch's mesh axes.
      weight: [*in_dims, *out_dims] float32, split in any way.
      num_in_dims: how many dims are summed over.
      dtype: of the operands.
      output_dtype: of the result.
    """
    return _forward(x, weight, num_in_dims, dtype, output_dtype)[0]


def _forward(x, weight, num_in_dims, dtype, output_dtype):
    whole = sharding.gather(weight.astype(dtype))
    y = _dot(x, whole, range(x.ndim - num_in_dims, x.ndim), range(num_in_dims), output_dtype)
    return y, (x, whole, weight)


def _backward(num_in_dims, dtype, output_dtype, kept, dy):
    del output_dtype
    x, whole, weight = kept
    dy = dy.astype(dtype)
    # A CPU turns x over for the weight's gradient, which is slow where it computes x meanwhile.
    x = jax.lax.optimization_barrier(x)
    num_rows = x.ndim - num_in_dims
    dx = _dot(dy, whole, range(num_rows, dy.ndim), range(num_in_dims, weight.ndim), x.dtype)
    split = jax.typeof(weight).sharding
    dw = _dot(x, dy, range(num_rows), range(num_rows), jnp.float32, split)
    return dx, dw


def _dot(
    a: jax.Array,
    b: jax.Array,
    dims_a: Sequence[int],
    dims_b: Sequence[int],
    dtype: jnp.dtype,
    out_sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    return jax.lax.dot_general(
        a,
        b,
        ((tuple(dims_a), tuple(dims_b)), ((), ())),
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )


weight_product.defvjp(_forward, _backward)
