"""The decoder: embedding, dense layers, layers with routed experts, norm, head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.linear import Embedding, Linear, RMSNorm
from moe_jax.layers.mlp import SwiGLU
from moe_jax.layers.moe import MoE, RouterBias, RoutingStats
from moe_jax.ops.rope import Rotary, rotary_angles


def _all_but_gathered(primitive, *_, **__) -> bool:
    # Kept, the whole dense weights of all layers would stand in memory at once.
    return primitive.name not in ("reshard", "all_gather", "pvary")


# What a layer keeps for its backward pass besides its input, by name.
REMATERIALIZATION = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "none": _all_but_gathered,
}


class Context(NamedTuple):
    """What all layers of a call share.

    segment_ids_BL: [batch, length] int32, 0 on padding.
    rotary: angles of the positions.
    scale: factor on attention scores.
    """

    segment_ids_BL: jax.Array
    rotary: Rotary
    scale: float


class Block(nnx.Module):
    """Pre-norm attention and a feed-forward layer, dense or routed, each added to the stream."""

    def __init__(
        self, config: ModelConfig, precision: PrecisionConfig, *, routed: bool, rngs: nnx.Rngs
    ):
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(dim, eps)
        self.attention = LatentAttention(config, precision, rngs=rngs)
        self.mlp_norm = RMSNorm(dim, eps)
        if routed:
            self.moe = MoE(config, precision, rngs=rngs)
        else:
            self.mlp = SwiGLU(
                dim,
                config.intermediate_size,
                std=config.initializer_range,
                dtype=jnp.dtype(precision.compute_dtype),
                rngs=rngs,
            )
        self.routed = routed

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, RoutingStats | None]:
        with jax.named_scope("attention"):
            x += self.attention(
                self.attention_norm(x), context.segment_ids_BL, context.rotary, context.scale
            )
        with jax.named_scope("moe" if self.routed else "mlp"):
            normed = self.mlp_norm(x)
            if self.routed:
                y, stats = self.moe(normed, context.segment_ids_BL > 0)
                return x + y, stats
            return x + self.mlp(normed), None


class Decoder(nnx.Module):
    """A DeepSeek-V3 language model.

    Layers of a kind are stacked along a leading dim of their parameters and scanned, so that
    compile time does not grow with depth.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: PrecisionConfig,
        *,
        rematerialization: str = "none",
        rngs: nnx.Rngs,
    ):
        std, dtype = config.initializer_range, jnp.dtype(precision.compute_dtype)
        self.config = config
        self.rematerialization = rematerialization
        self.embedding = Embedding(
            config.vocab_size, config.hidden_size, std=std, dtype=dtype, rngs=rngs
        )
        dense = config.first_k_dense_replace
        self.dense_blocks = _stack(config, precision, dense, routed=False, rngs=rngs)
        self.moe_blocks = _stack(
            config, precision, config.num_hidden_layers - dense, routed=True, rngs=rngs
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(
            (config.hidden_size,),
            (config.vocab_size,),
            ("embed", None),
            std=std,
            dtype=dtype,
            output_dtype=jnp.dtype(jnp.float32),
            rngs=rngs,
        )

    def hidden_states(
        self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, RoutingStats | None]:
        """The final norm's output, and what each routed layer reports.

        Args:
          tokens, segment_ids, positions: [batch, length] int32; segment 0 is padding.
        Returns:
          [batch, length, dim]; RoutingStats with a leading dim of routed layers, None without any.
        """
        sizes = self.config.attention
        context = Context(
            segment_ids,
            rotary_angles(positions, sizes.qk_rope_head_dim, sizes.rope_theta),
            (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim) ** -0.5,
        )
        with jax.named_scope("embedding"):
            x = self.embedding(tokens)
        with jax.named_scope("dense_layers"):
            x, _ = self._scan(self.dense_blocks, x, context)
        with jax.named_scope("moe_layers"):
            x, stats = self._scan(self.moe_blocks, x, context)
        return self.norm(x), stats

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [batch, length, vocab] float32 for tokens [batch, length] int32.

        Without positions and segment ids, a row is one document.
        """
        if positions is None:
            positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=tokens.dtype)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        return self.head(self.hidden_states(tokens, segment_ids, positions)[0])

    def _scan(
        self, blocks: Block | None, x: jax.Array, context: Context
    ) -> tuple[jax.Array, RoutingStats | None]:
        if blocks is None:
            return x, None
        graphdef, stacked = nnx.split(blocks)

        def layer(x, variables):
            return nnx.merge(graphdef, variables)(x, context)

        policy = REMATERIALIZATION[self.rematerialization]
        return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False, policy=policy), x, stacked)


def _stack(
    config: ModelConfig, precision: PrecisionConfig, layers: int, *, routed: bool, rngs: nnx.Rngs
) -> Block | None:
    """`layers` blocks as one, each parameter with a leading dim of layers."""
    if not layers:
        return None

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs: nnx.Rngs) -> Block:
        return Block(config, precision, routed=routed, rngs=rngs)

    return make(rngs)


__all__ = ["Block", "Context", "Decoder", "RouterBias", "RoutingStats"]
