"""Parameters and operations against counts by hand and the sizes that DeepSeek published."""

import dataclasses
from typing import Any

import jax
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import (
    AttentionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    PrecisionConfig,
)
from moe_jax.models.decoder import Decoder, RouterBias
from moe_jax.planning.operations import count_parameters, training_operations

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
HEADS = AttentionConfig(
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
# Sizes from the configurations that DeepSeek published.
V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    intermediate_size=18432,
    attention=HEADS,
    moe=MoEConfig(
        num_experts=256, num_experts_per_tok=8, num_shared_experts=1, intermediate_size=2048
    ),
)
V2 = ModelConfig(
    vocab_size=102400,
    hidden_size=5120,
    num_hidden_layers=60,
    first_k_dense_replace=1,
    intermediate_size=12288,
    attention=HEADS,
    moe=MoEConfig(
        num_experts=160, num_experts_per_tok=6, num_shared_experts=2, intermediate_size=1536
    ),
)
V2_LITE = ModelConfig(
    vocab_size=102400,
    hidden_size=2048,
    num_hidden_layers=27,
    first_k_dense_replace=1,
    intermediate_size=10944,
    attention=dataclasses.replace(HEADS, num_heads=16, q_lora_rank=None),
    moe=MoEConfig(
        num_experts=64, num_experts_per_tok=6, num_shared_experts=2, intermediate_size=1408
    ),
)


def _shapes(config: ModelConfig) -> tuple[Any, Any]:
    """Shapes of the parameters and of the router biases."""
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        model = nnx.eval_shape(lambda: Decoder(config, PrecisionConfig(), rngs=nnx.Rngs(0)))
    _, parameters, router_bias = nnx.split(model, nnx.Param, RouterBias)
    return nnx.to_pure_dict(parameters), nnx.to_pure_dict(router_bias)


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
    total, active = count_parameters(*_shapes(SMALL), SMALL)
    assert total == outside + dense + 2 * routed + bias
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
    total, active = count_parameters(parameters, router_bias, config)
    assert total == active > 0


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(V3, 671_026_419_200, 37_552_282_624), (V2, 235_741_434_880, None)]
    + [(V2_LITE, 15_706_484_224, None)],
    ids=["V3", "V2", "V2-Lite"],
)
def test_published_sizes(config: ModelConfig, total: int, active: int | None) -> None:
    parameters, router_bias = _shapes(config)
    if config is not V3:
        router_bias = {}  # V2 balances by losses alone
    counted = count_parameters(parameters, router_bias, config)
    assert counted[0] == total
    if active is not None:
        assert counted[1] == active


def test_operations_by_hand() -> None:
    # Two per weight and token forward, twice that backward; the embedding is a look-up. Position p
    # scores p + 1 keys of 3 + 2 dims and adds up as many values of 7: half of all, in a long row.
    products = 1000 - 11 * 6
    scores = 3 * 2 * (3 + 2 + 7) * 32 / 2
    assert training_operations(SMALL, 1000, 32) == 6 * (products + scores)


def test_operations_of_v3_grow_with_the_length() -> None:
    active = 37_552_282_624
    at_4k, at_8k = (training_operations(V3, active, length) for length in (4096, 8192))
    assert at_8k - at_4k == 6 * 61 * 128 * (128 + 64 + 128) * 2048
    assert 6 * (active - 129280 * 7168) < at_4k < 1.2 * 6 * active
