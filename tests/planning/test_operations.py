"""Parameters and operations against counts by hand; test_configs.py has the published sizes."""

import dataclasses
from typing import Any

import jax
import pytest
from compiled_steps import HELD, case_of, counts_of
from emulated import make_mesh

from moe_jax.config import (
    AttentionConfig,
    Config,
    ModelConfig,
    MoEConfig,
)
from moe_jax.models.language_model import abstract_weights
from moe_jax.planning.operations import (
    count,
    count_parameters,
    dense_operations,
    recomputed_operations,
    training_operations,
)
from moe_jax.planning.weights import weights_of

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
    total, active, mtp = count_parameters(*_shapes(SMALL), SMALL)[:3]
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
    total, active = count_parameters(parameters, router_bias, config)[:2]
    assert total == active > 0


def test_operations_by_hand() -> None:
    # Two per weight and token forward, twice that backward; the embedding is a look-up. Position p
    # scores p + 1 keys of 3 + 2 dims and adds up as many values of 7. Norms are no products.
    scores = 3 * 2 * (3 + 2 + 7) * 33 / 2
    counted = count_parameters(*_shapes(SMALL), SMALL)
    norms = 3 * (2 * 6 + 5 + 4) + 6
    products = counted.active - 11 * 6 - norms
    assert training_operations(SMALL, counted, 32) == 6 * (products + scores)
    # A tied table is the head as well.
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    tied_count = count_parameters(*_shapes(tied), tied)
    assert tied_count.total == counted.total - 11 * 6
    assert training_operations(tied, tied_count, 32) == 6 * (products + scores)


def test_operations_of_grouped_queries() -> None:
    heads = AttentionConfig(kind="grouped_query", num_heads=4, num_key_value_heads=2, head_dim=10)
    config = dataclasses.replace(SMALL, attention=heads)
    scores = 3 * 4 * (10 + 10) * 33 / 2
    counted = count_parameters(*_shapes(config), config)
    products = counted.active - 11 * 6 - 3 * 2 * 6 - 6
    assert training_operations(config, counted, 32) == 6 * (products + scores)


def test_what_predicts_ahead_reads_its_experts_and_the_head_once_more() -> None:
    config = dataclasses.replace(SMALL, num_nextn_predict_layers=2)
    counted = count_parameters(*_shapes(config), config)
    plain = count_parameters(*_shapes(SMALL), SMALL)
    one_expert = 3 * 6 * 9
    block = 6 * 5 + 5 + 5 * 2 * 5 + 6 * 6 + 4 + 4 * 2 * 10 + 2 * 7 * 6 + 2 * 6
    block += 6 * 8 + 8 + (8 + 2) * one_expert
    assert counted[:3] == (plain.total, plain.active, 2 * (block + 2 * 6 * 6 + 3 * 6))
    norms = 2 * (2 * 6 + 5 + 4 + 3 * 6)
    more = counted.mtp - 2 * (8 - 2) * one_expert - 2 * 8 + 2 * 11 * 6 - norms
    scores = 2 * 2 * (3 + 2 + 7) * 33 / 2
    assert training_operations(config, counted, 32) == training_operations(SMALL, plain, 32) + 6 * (
        more + scores
    )


def test_groups_add_up_and_a_dense_model_of_equal_size_uses_all() -> None:
    config = dataclasses.replace(SMALL, num_nextn_predict_layers=1)
    counted = count_parameters(*_shapes(config), config)
    assert sum(counted.by_group.values()) == counted.total
    assert sum(counted.mtp_by_group.values()) == counted.mtp
    assert counted.by_group["routed"] == 2 * 8 * 3 * 6 * 9
    assert counted.by_group["other"] == 3 * (2 * 6 + 5 + 4) + 6 + 2 * 8
    all_chosen = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, num_experts_per_tok=8)
    )
    dense = dense_operations(config, counted, 32)
    assert (
        dense
        == training_operations(all_chosen, counted, 32)
        > training_operations(config, counted, 32)
    )


def test_weights_of_a_model_that_is_not_here_are_those_of_one_that_is() -> None:
    config = dataclasses.replace(SMALL, num_nextn_predict_layers=1)
    assert count(weights_of(config), config) == count_parameters(*_shapes(config), config)


@pytest.mark.parametrize("config", HELD.values(), ids=HELD)
def test_the_compiled_step_does_what_is_counted(config: Config) -> None:
    case, model = case_of(config), config.model
    # Rows of one block of attention, in which every token looks at every other.
    length = 2 * case.length - 1
    counted = count(case.weights, model)
    needed = training_operations(model, counted, length)
    again = recomputed_operations(
        model,
        case.weights,
        length,
        config.training.rematerialization,
        "cpu",
        case.parts,
        fp8=case.fp8,
    )
    operations = (needed + sum(again.values())) * case.tokens * case.micro_batches
    compiled = counts_of(config).operations
    if config.training.rematerialization == "none":
        assert compiled == pytest.approx(operations, rel=1e-9)
    else:
        # Before JAX 0.11, XLA does not see that nothing asks for the last product of its loop.
        assert operations * (1 - 1e-9) <= compiled < 1.04 * operations
