"""Parameters and operations against counts by hand; test_configs.py has the published sizes."""

import dataclasses
from typing import Any

import jax
from emulated import make_mesh

from moe_jax.config import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
)
from moe_jax.models.language_model import abstract_weights
from moe_jax.planning.operations import Parameters, count_parameters, training_operations

SMALL = ModelConfig(
    vocab_size=11,
    hidden_size=6,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=10,
    attention=AttentionConfig(
        num_heads=2,
        q_lora_rank=5,
        kv_lora_rank=4,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=7,
    ),
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, num_shared_experts=2, intermediate_size=9),
)


def _shapes(config: ModelConfig) -> tuple[Any, Any]:
    """Shapes of the parameters and of the router biases."""
    return abstract_weights(config, make_mesh())


def test_a_small_model_by_hand() -> None:
    query = 6 * 5 + 5 + 5 * 2 * (3 + 2)  # down, norm, up
    key_value = 6 * (4 + 2) + 4 + 4 * 2 * (3 + 7)
    attention = query + key_value + 2 * 7 * 6
    norms = 2 * 6
    one_expert = 3 * 6 * 9
    dense = attention + norms + 3 * 6 * 10
    routed = attention + norms + 6 * 8 + (8 + 2) * one_expert
    outside = 2 * 11 * 6 + 6  # embedding and head, the last norm
    bias = 2 * 8
    total, active, mtp = count_parameters(*_shapes(SMALL), SMALL)
    assert total == outside + dense + 2 * routed + bias
    assert mtp == 0
    assert active == total - bias - 2 * (8 - 2) * one_expert


def test_queries_that_are_not_compressed_and_no_shared_expert() -> None:
    config = dataclasses.replace(
        SMALL,
        attention=dataclasses.replace(SMALL.attention, q_lora_rank=None),
        moe=dataclasses.replace(SMALL.moe, num_shared_experts=0),
    )
    compressed, plain = 6 * 5 + 5 + 5 * 2 * 5, 6 * 2 * 5
    expected = count_parameters(*_shapes(SMALL), SMALL)[0]
    expected += 3 * (plain - compressed) - 2 * 2 * 3 * 6 * 9
    assert count_parameters(*_shapes(config), config)[0] == expected


def test_a_model_without_routed_layers_uses_all_its_parameters() -> None:
    config = dataclasses.replace(SMALL, first_k_dense_replace=3)
    parameters, router_bias = _shapes(config)
    assert not jax.tree.leaves(router_bias)
    total, active, _ = count_parameters(parameters, router_bias, config)
    assert total == active > 0


def test_operations_by_hand() -> None:
    # Two per weight and token forward, twice that backward; the embedding is a look-up. Position p
    # scores p + 1 keys of 3 + 2 dims and adds up as many values of 7: half of all, in a long row.
    products = 1000 - 11 * 6
    scores = 3 * 2 * (3 + 2 + 7) * 32 / 2
    count = Parameters(total=5000, active=1000, mtp=0)
    assert training_operations(SMALL, count, 32) == 6 * (products + scores)
    # A tied table is the head as well.
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    assert training_operations(tied, count, 32) == 6 * (1000 + scores)


def test_operations_of_grouped_queries() -> None:
    heads = AttentionConfig(kind="grouped_query", num_heads=4, num_key_value_heads=2, head_dim=10)
    config = dataclasses.replace(SMALL, attention=heads)
    scores = 3 * 4 * (10 + 10) * 32 / 2
    count = Parameters(total=5000, active=1000, mtp=0)
    assert training_operations(config, count, 32) == 6 * (1000 - 11 * 6 + scores)


def test_what_predicts_ahead_reads_its_experts_and_the_head_once_more() -> None:
    config = dataclasses.replace(SMALL, num_nextn_predict_layers=2)
    count = count_parameters(*_shapes(config), config)
    plain = count_parameters(*_shapes(SMALL), SMALL)
    one_expert = 3 * 6 * 9
    block = 6 * 5 + 5 + 5 * 2 * 5 + 6 * 6 + 4 + 4 * 2 * 10 + 2 * 7 * 6 + 2 * 6
    block += 6 * 8 + 8 + (8 + 2) * one_expert
    assert count == (plain.total, plain.active, 2 * (block + 2 * 6 * 6 + 3 * 6))
    more = count.mtp - 2 * (8 - 2) * one_expert - 2 * 8 + 2 * 11 * 6
    scores = 2 * 2 * (3 + 2 + 7) * 32 / 2
    assert training_operations(config, count, 32) == training_operations(SMALL, plain, 32) + 6 * (
        more + scores
    )
