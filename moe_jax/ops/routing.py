"""Which experts a token goes to, and how far that is from balance (DeepSeek-V3, section 2.1.2).

Shapes: T tokens, E experts, G expert groups, K chosen experts per token, S sequences.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig


class Routing(NamedTuple):
    """expert_ids_TK: [tokens, top_k] int32; weights_TK: [tokens, top_k] float32."""

    expert_ids_TK: jax.Array
    weights_TK: jax.Array


def route(scores_TE: jax.Array, bias_E: jax.Array, config: MoEConfig) -> Routing:
    """Picks the top-k experts of each token among its best groups (equations 13 to 16).

    The bias steers the choice only; gate weights come from the unbiased scores. A group's score
    is the sum of its two best biased scores, and groups that lose are masked with -inf: masking
    with 0 would let an expert of a lost group win where biases are negative.

    Args:
      scores_TE: [tokens, experts] float32, affinities in (0, 1).
      bias_E: [experts] float32, in units of the score.
      config: the numbers of experts and groups, and how weights are scaled.
    Returns:
      A Routing whose weights sum to `routed_scaling_factor` per token if `norm_topk_prob`.
    """
    tokens, experts = scores_TE.shape
    groups = config.num_expert_groups
    biased_TE = scores_TE + bias_E
    if config.num_limited_groups < groups:
        grouped_TGe = biased_TE.reshape(tokens, groups, experts // groups)
        group_scores_TG = jnp.sum(jax.lax.top_k(grouped_TGe, min(2, experts // groups))[0], axis=-1)
        best_Tg = jax.lax.top_k(group_scores_TG, config.num_limited_groups)[1]
        kept_TG = jnp.any(best_Tg[:, :, None] == jnp.arange(groups), axis=1)
        biased_TE = jnp.where(kept_TG[:, :, None], grouped_TGe, -jnp.inf).reshape(tokens, experts)
    expert_ids_TK = jax.lax.top_k(biased_TE, config.num_experts_per_tok)[1]
    weights_TK = jnp.take_along_axis(scores_TE, expert_ids_TK, axis=1)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (jnp.sum(weights_TK, axis=1, keepdims=True) + 1e-20)
    return Routing(expert_ids_TK, weights_TK * config.routed_scaling_factor)


def sequence_balance(scores_SLE: jax.Array, valid_SL: jax.Array, top_k: int) -> jax.Array:
    """The sequence-wise balance loss without its weight alpha (equations 17 to 20).

    For one sequence: sum_i f_i P_i, where f_i is expert i's share of the top-k choices by unbiased
    score times experts / top_k, and P_i its mean score after each token's scores are scaled to
    sum 1. It is 1 at perfect balance. Padding counts in neither.

    Args:
      scores_SLE: [sequences, length, experts] float32.
      valid_SL: [sequences, length] bool, False on padding.
      top_k: experts per token.
    Returns:
      [sequences] float32; 0 for a sequence of padding only.
    """
    experts = scores_SLE.shape[-1]
    valid = valid_SL[..., None].astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(valid, axis=1), 1.0)
    ids_SLK = jax.lax.top_k(jax.lax.stop_gradient(scores_SLE), top_k)[1]
    chosen_SLE = jnp.sum(ids_SLK[..., None] == jnp.arange(experts), axis=2) * valid
    f_SE = jnp.sum(chosen_SLE, axis=1) * experts / (top_k * tokens)
    normalized = scores_SLE / (jnp.sum(scores_SLE, axis=-1, keepdims=True) + 1e-20)
    p_SE = jnp.sum(normalized * valid, axis=1) / tokens
    return jnp.sum(f_SE * p_SE, axis=-1)


def expert_load(expert_ids_TK: jax.Array, num_experts: int) -> jax.Array:
    """How many tokens chose each expert: [experts] int32; ids out of range count nowhere."""
    chosen = expert_ids_TK.reshape(-1, 1) == jnp.arange(num_experts)
    return jnp.sum(chosen, axis=0, dtype=jnp.int32)


def max_violation(load_LE: jax.Array) -> jax.Array:
    """MaxVio = (max load - mean load) / mean load, per layer.

    Args:
      load_LE: [layers, experts] int32.
    Returns:
      [layers] float32; 0 where nothing was routed.
    """
    mean = jnp.mean(load_LE.astype(jnp.float32), axis=-1)
    return (jnp.max(load_LE, axis=-1) - mean) / jnp.maximum(mean, 1e-20)


def update_bias(bias_LE: jax.Array, load_LE: jax.Array, speed: float) -> jax.Array:
    """Raises the bias of under-loaded experts by `speed` and lowers that of over-loaded ones.

    Auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2); once an update, from the load of
    the whole global batch.

    Args:
      bias_LE: [layers, experts] float32.
      load_LE: [layers, experts] int32.
      speed: gamma.
    """
    load = load_LE.astype(jnp.float32)
    return bias_LE + speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
