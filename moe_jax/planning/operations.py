"""Parameters and operations of a model, counted from its config and its shapes."""

import math
from typing import Any

import jax

from moe_jax.config import ModelConfig


def count_parameters(parameters: Any, router_bias: Any, config: ModelConfig) -> tuple[int, int]:
    """Parameters in total, and those that one token uses.

    The active ones leave out the experts that a token does not choose, and the router biases,
    which take part in no product; embedding and head count in both, as in the V3 report.

    Args:
      parameters, router_bias: trees of arrays or of their shapes.
    """
    trainable = sum(math.prod(x.shape) for x in jax.tree.leaves(parameters))
    biases = sum(math.prod(x.shape) for x in jax.tree.leaves(router_bias))
    moe = config.moe
    routed_layers = config.num_hidden_layers - config.first_k_dense_replace
    one_expert = 3 * config.hidden_size * moe.intermediate_size
    unchosen = routed_layers * (moe.num_experts - moe.num_experts_per_tok) * one_expert
    return trainable + biases, trainable - unchosen


def training_operations(config: ModelConfig, active_parameters: int, length: int) -> float:
    """Operations per token, forward and backward, that the model needs; none for recomputation.

    6 per active parameter but the embedding, which is a look-up, and the causal half of
    attention's two products.

    Args:
      active_parameters: of `count_parameters`.
      length: of a row, in tokens, as if each were one document.
    """
    attention = config.attention
    head_dims = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    scores = config.num_hidden_layers * attention.num_heads * head_dims * length / 2
    products = active_parameters - config.vocab_size * config.hidden_size
    return 6.0 * (products + scores)
