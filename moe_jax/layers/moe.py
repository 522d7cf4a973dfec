"""Routed and shared experts (DeepSeek-V3, section 2.1.2; DeepSeek-V2, section 2.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.linear import Fp8State, Initializer, parameter
from moe_jax.layers.mlp import SwiGLU
from moe_jax.ops import balance, dispatch, fp8_state, routing
from moe_jax.ops.backends import choose
from moe_jax.ops.fp8_recipes import RECIPES
from moe_jax.ops.grouped_matmul import Experts
from moe_jax.ops.placement import physical_ids
from moe_jax.ops.token_dropping import kept_choices
from moe_jax.sharding import BATCH, BATCH_AXES, EXPERT_AXES, P


class RouterBias(nnx.Variable):
    """Steers the choice of experts; a type of its own, so that the optimizer never sees it."""


class PlacementTable(nnx.Variable):
    """[experts, most replicas] int32, the slots of each expert (`ops/placement.py`)."""


class RoutingStats(NamedTuple):
    """What a routed layer reports, over all devices.

    load_E: [experts] int32, tokens that chose each expert.
    share_E: [experts] float32, sum over the same tokens of their normalised scores.
    z: [] float32, sum over them of the squared log-partition of the router's logits.
    sequence_losses: sums over sequences, by the names of `balance.sequence_losses`.
    dropped: [] int32, choices that a capacity dropped.
    rounds: [] int32, passes over the experts that the fullest buffer needed.
    """

    load_E: jax.Array
    share_E: jax.Array
    z: jax.Array
    sequence_losses: dict[str, jax.Array]
    dropped: jax.Array
    rounds: jax.Array


class Router(nnx.Module):
    """The gate's weight and, where it steers the choice, its bias."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, experts = config.hidden_size, config.moe.num_experts
        initializer = Initializer.of(config)
        self.weight = parameter(rngs, (dim, experts), ("embed", None), initializer, dim)
        if config.moe.topk_method == "noaux_tc":
            self.bias = RouterBias(jnp.zeros((experts,), jnp.float32))
        else:
            self.bias = None


class MoE(nnx.Module):
    """shared(x) + sum over the chosen experts: [batch, length, dim] to the same.

    Routing, dispatch, expert products and combine are one `shard_map` region.

    placement: None save in inference with redundant experts; `gate`, `up` and `down` then have a
      leading dim of slots, while router, bias and statistics know experts alone.
    """

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, *, rngs: nnx.Rngs):
        moe, dim = config.moe, config.hidden_size
        self.config = moe
        self.model = config
        self.dtype = jnp.dtype(precision.compute_dtype)
        self.combine_dtype = jnp.dtype(precision.combine_dtype)
        self.recipe = RECIPES.get(precision.recipe_of("experts"))
        reports = self.recipe is not None and precision.fp8_report
        self.fp8_state = Fp8State(jnp.stack([fp8_state.first()] * 2)) if reports else None
        self.fp8_form = precision.fp8_form
        self.exchange_fp8 = precision.recipe_of("dispatch") != "none"
        self.router = Router(config, rngs=rngs)
        self.placement: PlacementTable | None = nnx.data(None)
        initializer = Initializer.of(config)
        hidden = moe.intermediate_size
        wide, narrow = (moe.num_experts, dim, hidden), (moe.num_experts, hidden, dim)
        self.gate = parameter(rngs, wide, ("experts", "embed", None), initializer, dim)
        self.up = parameter(rngs, wide, ("experts", "embed", None), initializer, dim)
        self.down = parameter(rngs, narrow, ("experts", None, "embed"), initializer, hidden)
        if moe.num_shared_experts:
            self.shared = SwiGLU(
                dim,
                moe.num_shared_experts * hidden,
                initializer=initializer,
                precision=precision,
                rngs=rngs,
            )
        else:
            self.shared = None

    def __call__(
        self, x_BLD: jax.Array, valid_BL: jax.Array, training: bool
    ) -> tuple[jax.Array, RoutingStats]:
        """Padding (`valid_BL` False) is routed nowhere and counted nowhere.

        Only in `training` are tokens dropped, if the config has it so.
        """
        experts = self.gate[...], self.up[...], self.down[...]
        expert_specs = jax.tree.map(lambda w: jax.typeof(w).sharding.spec, experts)
        router_weight = self.router.weight[...]
        bias = None if self.router.bias is None else self.router.bias[...]
        router_spec = jax.typeof(router_weight).sharding.spec
        placement = None if self.placement is None else self.placement[...]
        fp8 = None if self.fp8_state is None else self.fp8_state[...]

        def region(x_BLD, valid_BL, router_weight, bias_E, experts, placement_ER, fp8):
            with jax.named_scope("gather_experts"):
                router_weight = sharding.gather_over(router_weight, router_spec)
                gate, up, down = experts
                gate_up = jnp.concatenate([gate, up], axis=2)  # while they are small
                experts = Experts(
                    sharding.gather_narrow(gate_up, expert_specs[0], self.dtype, keep=1),
                    sharding.gather_narrow(down, expert_specs[2], self.dtype, keep=1),
                    None if fp8 is None else sharding.vary(fp8),
                )
            return self._route_and_apply(
                x_BLD, valid_BL, router_weight, bias_E, experts, placement_ER, training
            )

        shared_BLD = x_BLD
        if self.shared is not None:
            # What comes through a barrier is ready before anything goes on. With one at either end,
            # shared experts run while tokens travel, forward and backward.
            x_BLD, shared_BLD = jax.lax.optimization_barrier((x_BLD, shared_BLD))
        routed_BLD, stats = jax.shard_map(
            region,
            in_specs=(BATCH, BATCH, router_spec, P(), expert_specs, P(), P()),
            out_specs=(BATCH, P()),
        )(x_BLD, valid_BL, router_weight, bias, experts, placement, fp8)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                shared_BLD = self.shared(shared_BLD)
                routed_BLD, shared_BLD = jax.lax.optimization_barrier((routed_BLD, shared_BLD))
                routed_BLD += shared_BLD
        return routed_BLD, stats

    def _route_and_apply(
        self, x_BLD, valid_BL, router_weight, bias_E, experts, placement_ER, training
    ):
        config, dim = self.config, x_BLD.shape[-1]
        with jax.named_scope("router"):
            # A narrow product would flip choices between experts of nearly equal score.
            logits_BLE = jnp.einsum(
                "bld,de->ble",
                x_BLD.astype(jnp.float32),
                router_weight,
                precision=jax.lax.Precision.HIGHEST,
            )
            scores_BLE = routing.affinities(logits_BLE, config.scoring_func)
            chosen = routing.route(scores_BLE.reshape(-1, config.num_experts), bias_E, config)
            ids_BLK = chosen.expert_ids_TK.reshape(*valid_BL.shape, -1)
            sequence_losses = balance.sequence_losses(scores_BLE, ids_BLK, valid_BL, config)
            shares_BLE = balance.normalized(scores_BLE)
            # What no loss weighs must not cost a backward pass.
            if not (config.switch_loss_weight or config.mixtral_loss_weight):
                shares_BLE = jax.lax.stop_gradient(shares_BLE)
            if not config.z_loss_weight:
                logits_BLE = jax.lax.stop_gradient(logits_BLE)
            share_E = jnp.sum(shares_BLE, axis=(0, 1), where=valid_BL[..., None])
            z = jnp.sum(jnp.square(jax.nn.logsumexp(logits_BLE, axis=-1)), where=valid_BL)
            ids_BLK = jnp.where(valid_BL[..., None], ids_BLK, jnp.int32(config.num_experts))
            load_E = routing.expert_load(ids_BLK, config.num_experts)
            if training and config.token_dropping != "none":
                chosen_BLK = chosen.expert_ids_TK.reshape(ids_BLK.shape)
                best_BLK = jnp.take_along_axis(scores_BLE, chosen_BLK, axis=-1)
                kept_BLK = kept_choices(ids_BLK, best_BLK, config, BATCH_AXES)
                ids_BLK = jnp.where(kept_BLK, ids_BLK, jnp.int32(config.num_experts))
            ids_TK = ids_BLK.reshape(-1, config.num_experts_per_tok)
        with jax.named_scope("dispatch"):
            x_TD, slots_TK = x_BLD.reshape(-1, dim), ids_TK
            groups = config.num_expert_groups, config.num_limited_groups
            if placement_ER is not None:
                groups = 1, 1  # of slots there are none
                slots_TK = physical_ids(ids_TK, placement_ER, jax.lax.axis_index(BATCH_AXES))
            y_TD, rounds = dispatch.apply_experts(
                x_TD,
                chosen.weights_TK,
                slots_TK,
                experts,
                dispatch.Balanced(
                    len(x_TD),
                    config.num_experts_per_tok,
                    len(experts.down_EFD) * jax.lax.axis_size(EXPERT_AXES),
                    config.buffer_factor,
                    *groups,
                ),
                axes=EXPERT_AXES,
                all_axes=BATCH_AXES,
                combine_dtype=self.combine_dtype,
                backends=choose(self.model, self.dtype)._replace(
                    recipe=self.recipe, fp8_form=self.fp8_form, exchange_fp8=self.exchange_fp8
                ),
                parts=config.exchange_parts if training else 1,
            )
        dropped = jnp.sum(load_E) - jnp.sum(ids_TK < config.num_experts, dtype=jnp.int32)
        load_E, share_E, z, sequence_losses, dropped = jax.lax.psum(
            (load_E, share_E, z, sequence_losses, dropped), BATCH_AXES
        )
        stats = RoutingStats(load_E, share_E, z, sequence_losses, dropped, rounds)
        return y_TD.reshape(x_BLD.shape).astype(x_BLD.dtype), stats
