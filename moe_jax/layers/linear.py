"""Products of activations with weights, and normalisation."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.ops import fp8_state
from moe_jax.ops.fp8_products import Fp8Product
from moe_jax.ops.fp8_recipes import RECIPES
from moe_jax.ops.weight_product import PLAIN, Product, weight_product
from moe_jax.sharding import BATCH, P


@dataclasses.dataclass(frozen=True)
class Initializer:
    """How weights start: see `ModelConfig.initializer`."""

    kind: str
    range: float

    @classmethod
    def of(cls, config: ModelConfig) -> "Initializer":
        return cls(config.initializer, config.initializer_range)

    def __call__(self, key: jax.Array, shape: Sequence[int], fan_in: int, spec: P) -> jax.Array:
        if self.kind == "normal":
            return self.range * jax.random.normal(key, shape, jnp.float32, out_sharding=spec)
        assert self.kind == "fan_in", self.kind
        std = math.sqrt(self.range / fan_in)
        return std * jax.random.truncated_normal(
            key, -2.0, 2.0, shape, jnp.float32, out_sharding=spec
        )


def parameter(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    logical_axes: Sequence[str | None],
    initializer: Initializer,
    fan_in: int,
) -> nnx.Param:
    """A random float32 parameter, made in parts on the devices that hold it."""
    spec = sharding.parameter_spec(shape, logical_axes)
    return nnx.Param(initializer(rngs.params(), shape, fan_in, spec))


def product_of(precision: PrecisionConfig, part: str) -> Product:
    """The product that the recipe has for a part of the model, of `config.FP8_PARTS`."""
    recipe = precision.recipe_of(part)
    if recipe == "none":
        return PLAIN
    return Fp8Product(RECIPES[recipe], precision.fp8_report, precision.fp8_form)


class Fp8State(nnx.Variable):
    """What a product in eight bits remembers (`ops/fp8_state.py`)."""


class Linear(nnx.Module):
    """A product over the last dims of its input: [..., *in_dims] to [..., *out_dims].

    Args:
      in_dims: dims that are summed over.
      out_dims: dims that take their place.
      logical_axes: of `in_dims + out_dims` (`sharding.RULES`).
      initializer: of the weights.
      dtype: of the product's operands; the master weight stays float32.
      output_dtype: of the result; `dtype` if None.
      product: of x and the whole weight on one device.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        out_dims: Sequence[int],
        logical_axes: Sequence[str | None],
        *,
        initializer: Initializer,
        dtype: jnp.dtype,
        output_dtype: jnp.dtype | None = None,
        product: Product = PLAIN,
        rngs: nnx.Rngs,
    ):
        self.product = product
        self.num_in_dims = len(in_dims)
        self.dtype = dtype
        self.output_dtype = output_dtype or dtype
        self.weight = parameter(
            rngs, (*in_dims, *out_dims), logical_axes, initializer, math.prod(in_dims)
        )
        self.fp8_state = Fp8State(fp8_state.first()) if product.has_state else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return weight_product(
            x.astype(self.dtype),
            self.weight[...],
            self.num_in_dims,
            self.output_dtype,
            self.product,
            None if self.fp8_state is None else self.fp8_state[...],
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

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        initializer: Initializer,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.weight = parameter(rngs, (vocab_size, dim), (None, "embed"), initializer, dim)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = self.weight[...]
        spec = jax.typeof(table).sharding.spec

        def look_up(part, tokens):
            """Each device looks up its part of the vectors of all tokens, and gives them away.

            Tokens and vectors travel, and never the table; nor does its gradient, which adds up
            over a token's many occurrences in float32: the cast comes behind the look-up.
            """
            axes, part = sharding.split_axes(spec, 1), sharding.vary(part)
            if jax.lax.axis_size(axes) == 1:
                return part.at[tokens].get().astype(self.dtype)
            tokens = jax.lax.all_gather(tokens, axes, tiled=True)
            vectors = part.at[tokens].get().astype(self.dtype)
            return jax.lax.all_to_all(
                vectors, axes, split_axis=0, concat_axis=vectors.ndim - 1, tiled=True
            )

        return jax.shard_map(look_up, in_specs=(spec, BATCH), out_specs=BATCH)(table, tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        """x times the transposed table, for tied embeddings: [..., dim] to [..., vocab] float32."""
        weight = jnp.transpose(self.weight[...])
        return weight_product(x.astype(self.dtype), weight, 1, jnp.dtype(jnp.float32))
