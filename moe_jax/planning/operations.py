"""Parameters and operations of a model, counted from its config and its shapes."""

import math
from typing import Any, NamedTuple

import jax

from moe_jax.config import ModelConfig


class Parameters(NamedTuple):
    """total: of the main model; active: those of them that one token uses; mtp: of the modules of
    multi-token prediction, which are counted in neither."""

    total: int
    active: int
    mtp: int


def count_parameters(parameters: Any, router_bias: Any, config: ModelConfig) -> Parameters:
    """Parameters from their shapes, as the DeepSeek reports count them.

    The active ones leave out the experts that a token does not choose, and the router biases,
    which take part in no product; embedding and head count in both.

    Args:
      parameters, router_bias: trees of arrays or of their shapes.
    """
    mtp = _size(parameters.get("mtp", {})) + _size(router_bias.get("mtp", {}))
    biases = _size(router_bias.get("moe_blocks", {}))
    total = _size(parameters) + _size(router_bias) - mtp
    moe = config.moe
    routed_layers = config.num_hidden_layers - config.first_k_dense_replace
    one_expert = 3 * config.hidden_size * moe.intermediate_size
    unchosen = routed_layers * (moe.num_experts - moe.num_experts_per_tok) * one_expert
    return Parameters(total, total - biases - unchosen, mtp)


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def training_operations(config: ModelConfig, count: Parameters, length: int) -> float:
    """Operations per token, forward and backward, that the model needs; none for recomputation.

    6 per active parameter but the embedding, which is a look-up, and the causal half of
    attention's two products. Multi-token prediction adds its own, and the head once more a depth.

    Args:
      count: of `count_parameters`.
      length: of a row, in tokens, as if each were one document.
    """
    attention, depth = config.attention, config.num_nextn_predict_layers
    if attention.kind == "latent":
        query_key = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        head_dims = query_key + attention.v_head_dim
    else:
        head_dims = 2 * attention.head_dim
    layers = config.num_hidden_layers + depth
    scores = layers * attention.num_heads * head_dims * length / 2
    table = config.vocab_size * config.hidden_size
    # A tied table is looked up and is the head as well.
    products = count.active - (0 if config.tie_word_embeddings else table)
    if depth:
        moe = config.moe
        one_expert = 3 * config.hidden_size * moe.intermediate_size
        routed = config.num_hidden_layers > config.first_k_dense_replace
        unchosen = (moe.num_experts - moe.num_experts_per_tok) * one_expert if routed else 0
        biases = moe.num_experts if routed and moe.topk_method == "noaux_tc" else 0
        products += count.mtp + depth * (table - unchosen - biases)
    return 6.0 * (products + scores)
