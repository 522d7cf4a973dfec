"""Which experts a token goes to.

DeepSeek-V3, section 2.1.2, and DeepSeek-V2, section 2.2.2; Mixtral and Switch Transformer are the
same without groups.

Shapes: T tokens, E experts, G expert groups, K chosen experts per token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig


class Routing(NamedTuple):
    """expert_ids_TK: [tokens, top_k] int32; weights_TK: [tokens, top_k] float32."""

    expert_ids_TK: jax.Array
    weights_TK: jax.Array


def affinities(logits: jax.Array, scoring_func: str) -> jax.Array:
    """Scores of experts for a token, [..., experts] float32, each in (0, 1)."""
    if scoring_func == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    assert scoring_func == "sigmoid", scoring_func
    return jax.nn.sigmoid(logits)


def route(scores_TE: jax.Array, bias_E: jax.Array | None, config: MoEConfig) -> Routing:
    """Picks the top-k experts of each token, among its best groups if `topk_method` has groups.

    The bias steers the choice only; gate weights come from the unbiased scores (V3, equations 13 to
    16). A group's score is the sum of its two best biased scores (V3, "noaux_tc") or its best score
    (V2, "group_limited_greedy"). Groups that lose are masked with -inf: masking with 0 would let an
    expert of a lost group win where biases are negative.

    Args:
      scores_TE: [tokens, experts] float32, affinities in (0, 1).
      bias_E: [experts] float32, in units of the score; for "noaux_tc" alone.
      config: the numbers of experts and groups, and how weights are scaled.
    Returns:
      A Routing whose weights sum to `routed_scaling_factor` per token if `norm_topk_prob`.
    """
    tokens, experts = scores_TE.shape
    groups = config.num_expert_groups
    steered_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if config.topk_method != "greedy" and config.num_limited_groups < groups:
        grouped_TGe = steered_TE.reshape(tokens, groups, experts // groups)
        best_of_group = 2 if config.topk_method == "noaux_tc" else 1
        best_of_group = min(best_of_group, experts // groups)
        group_scores_TG = jnp.sum(jax.lax.top_k(grouped_TGe, best_of_group)[0], axis=-1)
        best_Tg = jax.lax.top_k(group_scores_TG, config.num_limited_groups)[1]
        kept_TG = jnp.any(best_Tg[:, :, None] == jnp.arange(groups), axis=1)
        steered_TE = jnp.where(kept_TG[:, :, None], grouped_TGe, -jnp.inf).reshape(tokens, experts)
    expert_ids_TK = jax.lax.top_k(steered_TE, config.num_experts_per_tok)[1]
    weights_TK = jnp.take_along_axis(scores_TE, expert_ids_TK, axis=1)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (jnp.sum(weights_TK, axis=1, keepdims=True) + 1e-20)
    return Routing(expert_ids_TK, weights_TK * config.routed_scaling_factor)


def expert_load(expert_ids_TK: jax.Array, num_experts: int) -> jax.Array:
    """How many tokens chose each expert: [experts] int32; ids out of range count nowhere."""
    ids_KN = jnp.moveaxis(expert_ids_TK, -1, 0).reshape(expert_ids_TK.shape[-1], -1)
    # One choice after the other, so that no array of choices times experts is written.
    chosen_NE = ((ids_N[:, None] == jnp.arange(num_experts)).astype(jnp.int32) for ids_N in ids_KN)
    return jnp.sum(functools.reduce(jnp.add, chosen_NE), axis=0)
