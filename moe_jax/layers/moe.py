"""Routed and shared experts (DeepSeek-V3, section 2.1.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.linear import parameter
from moe_jax.layers.mlp import SwiGLU
from moe_jax.ops import dispatch, routing
from moe_jax.sharding import BATCH, BATCH_AXES, EXPERT_AXES, P


class RouterBias(nnx.Variable):
    """Steers the choice of experts; a type of its own, so that the optimizer never sees it."""


class RoutingStats(NamedTuple):
    """What a routed layer reports, over all devices.

    load_E: [experts] int32, tokens that chose each expert.
    balance_loss: [] float32, sum over sequences of the sequence-wise loss, without its weight.
    dropped: [] int32, choices that no round served.
    rounds: [] int32, exchanges that the fullest buffer needed.
    """

    load_E: jax.Array
    balance_loss: jax.Array
    dropped: jax.Array
    rounds: jax.Array


class Router(nnx.Module):
    """Affinities of tokens to experts: float32 product, sigmoid."""

    def __init__(self, dim: int, num_experts: int, *, std: float, rngs: nnx.Rngs):
        self.weight = parameter(rngs, (dim, num_experts), ("embed", None), std)
        self.bias = RouterBias(jnp.zeros((num_experts,), jnp.float32))


class MoE(nnx.Module):
    """shared(x) + sum over the chosen experts: [batch, length, dim] to the same.

    Routing, dispatch, expert products and combine are one `shard_map` region.
    """

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, *, rngs: nnx.Rngs):
        moe, dim, std = config.moe, config.hidden_size, config.initializer_range
        self.config = moe
        self.dtype = jnp.dtype(precision.compute_dtype)
        self.combine_dtype = jnp.dtype(precision.combine_dtype)
        self.router = Router(dim, moe.num_experts, std=std, rngs=rngs)
        wide = (moe.num_experts, dim, moe.intermediate_size)
        narrow = (moe.num_experts, moe.intermediate_size, dim)
        self.gate = parameter(rngs, wide, ("experts", "embed", None), std)
        self.up = parameter(rngs, wide, ("experts", "embed", None), std)
        self.down = parameter(rngs, narrow, ("experts", None, "embed"), std)
        if moe.num_shared_experts:
            hidden = moe.num_shared_experts * moe.intermediate_size
            self.shared = SwiGLU(dim, hidden, std=std, dtype=self.dtype, rngs=rngs)
        else:
            self.shared = None

    def __call__(self, x_BLD: jax.Array, valid_BL: jax.Array) -> tuple[jax.Array, RoutingStats]:
        """Padding (`valid_BL` False) is routed nowhere and counted nowhere."""
        experts = dispatch.Experts(self.gate[...], self.up[...], self.down[...])
        expert_specs = jax.tree.map(lambda w: jax.typeof(w).sharding.spec, experts)
        router_weight, bias = self.router.weight[...], self.router.bias[...]
        router_spec = jax.typeof(router_weight).sharding.spec

        def region(x_BLD, valid_BL, router_weight, bias_E, experts):
            with jax.named_scope("gather_experts"):
                router_weight = sharding.gather_over(router_weight, router_spec)
                experts = jax.tree.map(
                    lambda w, spec: _whole(w, spec, self.dtype), experts, expert_specs
                )
            return self._route_and_apply(x_BLD, valid_BL, router_weight, bias_E, experts)

        routed, stats = jax.shard_map(
            region,
            in_specs=(BATCH, BATCH, router_spec, P(), expert_specs),
            out_specs=(BATCH, P()),
        )(x_BLD, valid_BL, router_weight, bias, experts)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                routed += self.shared(x_BLD)
        return routed, stats

    def _route_and_apply(self, x_BLD, valid_BL, router_weight, bias_E, experts):
        config, dim = self.config, x_BLD.shape[-1]
        with jax.named_scope("router"):
            # A narrow product would flip choices between experts of nearly equal score.
            scores_BLE = jax.nn.sigmoid(
                jnp.einsum(
                    "bld,de->ble",
                    x_BLD.astype(jnp.float32),
                    router_weight,
                    precision=jax.lax.Precision.HIGHEST,
                )
            )
            balance = routing.sequence_balance(scores_BLE, valid_BL, config.num_experts_per_tok)
            chosen = routing.route(scores_BLE.reshape(-1, config.num_experts), bias_E, config)
            ids_TK = jnp.where(
                valid_BL.reshape(-1, 1), chosen.expert_ids_TK, jnp.int32(config.num_experts)
            )
        with jax.named_scope("dispatch"):
            x_TD = x_BLD.reshape(-1, dim)
            capacity = dispatch.capacity(
                x_TD.shape[0],
                config.num_experts_per_tok,
                config.num_experts,
                config.buffer_factor,
            )
            plan = dispatch.make_plan(ids_TK, config.num_experts, capacity, BATCH_AXES)
            y_TD = dispatch.apply_experts(
                x_TD,
                chosen.weights_TK,
                experts,
                plan,
                axes=EXPERT_AXES,
                capacity=capacity,
                combine_dtype=self.combine_dtype,
            )
        load_E = routing.expert_load(ids_TK, config.num_experts)
        served = jnp.sum((ids_TK < config.num_experts) & (plan.rank_TK < plan.rounds * capacity))
        dropped = jnp.sum(load_E) - served.astype(jnp.int32)
        load_E, balance_loss, dropped = jax.lax.psum(
            (load_E, jnp.sum(balance), dropped), BATCH_AXES
        )
        stats = RoutingStats(load_E, balance_loss, dropped, plan.rounds)
        return y_TD.reshape(x_BLD.shape).astype(x_BLD.dtype), stats


def _whole(shard: jax.Array, spec: P, dtype: jnp.dtype) -> jax.Array:
    """An expert weight's shard, whole in all dims but experts, and varying over the batch's axes.

    It is made varying here, once, so that its gradient is reduced once and not in every round. The
    narrow form travels; the gradient is reduced in float32.
    """

    def gather(shard):
        shard = sharding.gather_over(shard, spec, keep=1)
        varying = jax.typeof(shard).manual_axis_type.varying
        missing = tuple(axis for axis in BATCH_AXES if axis not in varying)
        return jax.lax.pcast(shard, missing, to="varying") if missing else shard

    @jax.custom_vjp
    def gather_narrow(shard):
        return gather(shard.astype(dtype))

    def backward(shard, gradient):
        return jax.vjp(gather, shard)[1](gradient.astype(jnp.float32))

    gather_narrow.defvjp(lambda shard: (gather_narrow(shard), shard), backward)
    return gather_narrow(shard)
