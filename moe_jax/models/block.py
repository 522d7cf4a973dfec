"""One layer of a decoder, and the stack of layers of a kind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import AttentionConfig, ModelConfig, PrecisionConfig
from moe_jax.layers.cache import Entries, LayerCache
from moe_jax.layers.grouped_query_attention import GroupedQueryAttention
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.linear import Initializer, RMSNorm
from moe_jax.layers.mlp import SwiGLU
from moe_jax.layers.moe import MoE, RoutingStats
from moe_jax.ops.rope import Rotary, rotary_angles

ATTENTION = {"latent": LatentAttention, "grouped_query": GroupedQueryAttention}


PRODUCTS = ("dot_general",)
# What a token is sent to, and what has come: kept, nothing is chosen or sent twice.
ROUTED = ("top_k", "sort", "scatter", "scatter-add", "all_to_all", "ragged_all_to_all")


def _keep(primitives: tuple[str, ...], names: tuple[str, ...]) -> Callable[..., bool]:
    def policy(primitive, *_, **parameters) -> bool:
        if primitive.name == "name":
            return parameters["name"] in names
        return primitive.name in primitives

    return policy


# What a layer keeps for its backward pass besides its input, by name. Gathered weights are never
# kept: those of all layers would stand in memory at once.
REMATERIALIZATION = {
    "none": _keep(PRODUCTS + ROUTED, ("latent", "attention", "slots", "expert_gate_up")),
    "minimal": _keep(ROUTED, ("latent", "attention", "slots", "arrived")),
    "latent": _keep((), ("latent", "attention")),
    "full": _keep((), ()),
}
# With operands of eight bits, "none" keeps latents, the result of attention, the stream behind it
# and, in eight bits, routed rows and SwiGLU's inputs. As in DeepSeek-V3, MLA's up-projections are
# computed again.
KEPT_IN_FP8 = _keep(
    ROUTED, ("latent", "attention", "stream", "slots", "arrived", "expert_gate_up", "gate_up")
)


class Context(NamedTuple):
    """What all layers of a call share.

    segment_ids_BL: [batch, length] int32, 0 on padding.
    valid_BL: [batch, length] bool, the tokens that are routed.
    rotary: angles of the positions.
    training: whether tokens may be dropped.
    """

    segment_ids_BL: jax.Array
    valid_BL: jax.Array
    rotary: Rotary
    training: bool


def make_context(
    segment_ids: jax.Array, positions: jax.Array, config: ModelConfig, training: bool
) -> Context:
    """The context of tokens with these segment ids and positions, [batch, length] int32."""
    angles = rotary_angles(positions, rotary_dim(config.attention), config.rope)
    return Context(segment_ids, segment_ids > 0, angles, training)


def rotary_dim(config: AttentionConfig) -> int:
    return config.qk_rope_head_dim if config.kind == "latent" else config.head_dim


class Block(nnx.Module):
    """Pre-norm attention and a feed-forward layer, dense or routed, each added to the stream."""

    def __init__(
        self, config: ModelConfig, precision: PrecisionConfig, *, routed: bool, rngs: nnx.Rngs
    ):
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(dim, eps)
        self.attention = ATTENTION[config.attention.kind](config, precision, rngs=rngs)
        self.mlp_norm = RMSNorm(dim, eps)
        if routed:
            self.moe = MoE(config, precision, rngs=rngs)
        else:
            self.mlp = SwiGLU(
                dim,
                config.intermediate_size,
                initializer=Initializer.of(config),
                precision=precision,
                rngs=rngs,
            )
        self.routed = routed

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, RoutingStats | None]:
        with jax.named_scope("attention"):
            x += self.attention(self.attention_norm(x), context.segment_ids_BL, context.rotary)
        return self._feed_forward(checkpoint_name(x, "stream"), context)

    def prefill(self, x: jax.Array, context: Context) -> tuple[jax.Array, Entries]:
        """The stream, and what a cache keeps of each token."""
        with jax.named_scope("attention"):
            attended, entries = self.attention.prefill(
                self.attention_norm(x), context.segment_ids_BL, context.rotary
            )
        return self._feed_forward(x + attended, context)[0], entries

    def decode(
        self, x: jax.Array, cache: LayerCache, positions: jax.Array, context: Context
    ) -> tuple[jax.Array, LayerCache]:
        """New tokens of each row, [batch, length, dim], after those in the cache."""
        with jax.named_scope("attention"):
            attended, cache = self.attention.decode(
                self.attention_norm(x), cache, positions, context.rotary
            )
        return self._feed_forward(x + attended, context)[0], cache

    def _feed_forward(
        self, x: jax.Array, context: Context
    ) -> tuple[jax.Array, RoutingStats | None]:
        with jax.named_scope("moe" if self.routed else "mlp"):
            normed = self.mlp_norm(x)
            if self.routed:
                y, stats = self.moe(normed, context.valid_BL, context.training)
                return x + y, stats
            return x + self.mlp(normed), None


def stack(layers: int, make: Any, rngs: nnx.Rngs) -> Any:
    """`layers` modules of `make(rngs=...)` as one, each parameter with a leading dim of layers.

    None for no layers.
    """
    if not layers:
        return None

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def make_all(rngs: nnx.Rngs):
        return make(rngs=rngs)

    return make_all(rngs)


def policy_of(rematerialization: str, precision: PrecisionConfig) -> Callable[..., bool]:
    """What of a layer is kept."""
    if rematerialization == "none" and precision.recipe != "none":
        return KEPT_IN_FP8
    return REMATERIALIZATION[rematerialization]


def scan(
    stacked: Any,
    function: Any,
    carry: Any,
    xs: Any,
    policy: Callable[..., bool] = REMATERIALIZATION["none"],
) -> Any:
    """`jax.lax.scan` of function(module, carry, x) over stacked modules, each recomputed by policy.

    Args:
      stacked: of `stack`.
      xs: a tree with a leading dim of layers, or None.
      policy: of `policy_of`.
    """
    graphdef, variables = nnx.split(stacked)

    def layer(carry, inputs):
        variables, x = inputs
        return function(nnx.merge(graphdef, variables), carry, x)

    return jax.lax.scan(
        jax.checkpoint(layer, prevent_cse=False, policy=policy), carry, (variables, xs)
    )
