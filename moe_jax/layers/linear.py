"""Products of activations with weights, and normalisation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.ops.weight_product import weight_product


def parameter(
    rngs: nnx.Rngs, shape: Sequence[int], logical_axes: Sequence[str | None], std: float
) -> nnx.Param:
    """A float32 parameter from a normal distribution, made in parts on the devices that hold it."""
    spec = sharding.parameter_spec(shape, logical_axes)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec))


class Linear(nnx.Module):
    """A product over the last dims of its input: [..., *in_dims] to [..., *out_dims].

    Args:
      in_dims: dims that are summed over.
      out_dims: dims that take their place.
      logical_axes: of `in_dims + out_dims` (`sharding.RULES`).
      std: standard deviation of the initial weights.
      dtype: of the product's operands; the master weight stays float32.
      output_dtype: of the result; `dtype` if None.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        out_dims: Sequence[int],
        logical_axes: Sequence[str | None],
        *,
        std: float,
        dtype: jnp.dtype,
        output_dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_in_dims = len(in_dims)
        self.dtype = dtype
        self.output_dtype = output_dtype or dtype
        self.weight = parameter(rngs, (*in_dims, *out_dims), logical_axes, std)

    def __call__(self, x: jax.Array) -> jax.Array:
        return weight_product(
            x.astype(self.dtype), self.weight[...], self.num_in_dims, self.dtype, self.output_dtype
        )


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dim, in float32; the result has x's dtype."""

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A vector per token id: [...] int32 to [..., dim] `dtype`."""

    def __init__(self, vocab_size: int, dim: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.weight = parameter(rngs, (vocab_size, dim), (None, "embed"), std)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # The cast comes last: the gradient adds up over a token's many occurrences, in float32.
        table = sharding.gather(self.weight[...])
        spec = jax.typeof(tokens).sharding.spec
        return table.at[tokens].get(out_sharding=sharding.P(*spec, None)).astype(self.dtype)
