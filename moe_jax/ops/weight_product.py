"""The product of activations with a weight that is stored in parts, in float32."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from moe_jax import sharding


class Product(Protocol):
    """x times the whole weight on one device: [..., *in_dims] and [*in_dims, *out_dims].

    weight: float32 of values that x's dtype holds, so that its gradient is float32 (XLA takes
      widening and narrowing out again).
    num_in_dims: how many dims are summed over.
    state: [3, WIDTH] of `fp8_state` if `has_state`.
    """

    @property
    def has_state(self) -> bool: ...

    def __call__(
        self,
        x: jax.Array,
        weight: jax.Array,
        num_in_dims: int,
        output_dtype: jnp.dtype,
        state: jax.Array | None,
    ) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class PlainProduct:
    """In x's dtype."""

    has_state: bool = False

    def __call__(
        self,
        x: jax.Array,
        weight: jax.Array,
        num_in_dims: int,
        output_dtype: jnp.dtype,
        state: jax.Array | None,
    ) -> jax.Array:
        del state
        return _product(x, weight, num_in_dims, output_dtype)


PLAIN = PlainProduct()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, weight, num_in_dims, output_dtype):
    return _forward(x, weight, num_in_dims, output_dtype)[0]


def _forward(x, weight, num_in_dims, output_dtype):
    weight = weight.astype(x.dtype)
    y = _dot(x, weight, range(x.ndim - num_in_dims, x.ndim), range(num_in_dims), output_dtype)
    return y, (x, weight)


def _backward(num_in_dims, output_dtype, kept, dy):
    del output_dtype
    x, weight = kept
    dy = dy.astype(x.dtype)
    # A CPU turns x over for the weight's gradient, which is slow where it computes x meanwhile.
    x = jax.lax.optimization_barrier(x)
    num_rows = x.ndim - num_in_dims
    dx = _dot(dy, weight, range(num_rows, dy.ndim), range(num_in_dims, weight.ndim), x.dtype)
    return dx, _dot(x, dy, range(num_rows), range(num_rows), jnp.float32)


_product.defvjp(_forward, _backward)


def weight_product(
    x: jax.Array,
    weight: jax.Array,
    num_in_dims: int,
    output_dtype: jnp.dtype,
    product: Product = PLAIN,
    state: jax.Array | None = None,
) -> jax.Array:
    """x times the whole weight: [..., *in_dims] and [*in_dims, *out_dims] to [..., *out_dims].

    Only the weight's narrow form travels. Its gradient is float32 from its product on, and each
    part of it is summed over the devices on its own.

    Args:
      x: [..., *in_dims], a dim of rows split over the batch's mesh axes; its dtype is the narrow
        one.
      weight: [*in_dims, *out_dims] float32, split in any way.
      num_in_dims: how many dims are summed over.
      output_dtype: of the result.
      product: on one device.
      state: of the product; its gradient is a report.
    """
    spec, rows = jax.typeof(weight).sharding.spec, jax.typeof(x).sharding.spec

    def region(x, shard, state):
        weight = sharding.gather_narrow(shard, spec, x.dtype)
        return product(x, weight, num_in_dims, output_dtype, state)

    out = sharding.P(*rows[: x.ndim - num_in_dims])
    return jax.shard_map(region, in_specs=(rows, spec, sharding.P()), out_specs=out)(
        x, weight, state
    )


def _dot(
    a: jax.Array, b: jax.Array, dims_a: Sequence[int], dims_b: Sequence[int], dtype: jnp.dtype
) -> jax.Array:
    dims = ((tuple(dims_a), tuple(dims_b)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)
