"""Multi-token prediction: each position also predicts tokens further on (DeepSeek-V3, 2.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.linear import Initializer, Linear, RMSNorm, product_of
from moe_jax.layers.moe import RoutingStats
from moe_jax.models.block import Block, Context


class Ahead(NamedTuple):
    """What the modules of all depths give; K is the depth.

    hidden_KBLD: [depth, batch, length, dim]; the head makes logits of it.
    stats: RoutingStats with a leading dim of depth; None without routed experts.
    """

    hidden_KBLD: jax.Array
    stats: RoutingStats | None


class PredictionModule(nnx.Module):
    """One depth: the states of the depth before it, and the embedding of one more token."""

    def __init__(
        self, config: ModelConfig, precision: PrecisionConfig, *, routed: bool, rngs: nnx.Rngs
    ):
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = RMSNorm(dim, eps)
        self.hidden_norm = RMSNorm(dim, eps)
        self.projection = Linear(
            (2 * dim,),
            (dim,),
            ("embed", "wide"),
            initializer=Initializer.of(config),
            dtype=jnp.dtype(precision.compute_dtype),
            product=product_of(precision, "mtp"),
            rngs=rngs,
        )
        self.block = Block(config, precision, routed=routed, rngs=rngs)
        self.norm = RMSNorm(dim, eps)

    def combine(self, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
        """The input of the block (equation 21); the public checkpoint has the embedding first.

        Args:
          hidden: [batch, length, dim], of the depth before, after its norm.
          embedded: [batch, length, dim], of the token `depth` places on.
        """
        both = [self.embedding_norm(embedded), self.hidden_norm(hidden)]
        return self.projection(jnp.concatenate(both, axis=-1))

    def __call__(
        self, hidden: jax.Array, embedded: jax.Array, context: Context
    ) -> tuple[jax.Array, RoutingStats | None]:
        x, stats = self.block(self.combine(hidden, embedded), context)
        return self.norm(x), stats


def shifted(x: jax.Array, places: int) -> jax.Array:
    """x[:, t + places] at [:, t], 0 past the end: [batch, length]."""
    # One pad and no slice, which JAX 0.12 lets forget the split of a row with one place left.
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (-places, places, 0)))


def reaches(segment_ids: jax.Array, places: int) -> jax.Array:
    """Where the token `places` on is of the same document: [batch, length] bool."""
    return (shifted(segment_ids, places) == segment_ids) & (segment_ids > 0)
