"""config.json both ways, and what it may not hold."""

import dataclasses
from typing import Any

import pytest
from folders import FAMILIES, LLAMA, MIXTRAL, V2, V3

from moe_jax.config import RopeConfig, UserError
from moe_jax.interop.families import from_huggingface, to_huggingface


@pytest.mark.parametrize("raw", FAMILIES.values(), ids=FAMILIES)
def test_a_config_comes_back(raw: dict[str, Any]) -> None:
    config = from_huggingface(raw)
    assert from_huggingface(to_huggingface(config, "float32")) == config
    assert to_huggingface(config, "float32")["model_type"] == raw["model_type"]


YARN = {
    "factor": 40,
    "original_max_position_embeddings": 16,
    "beta_fast": 16,
    "beta_slow": 2,
    "mscale": 0.7,
    "mscale_all_dim": 0.5,
}


@pytest.mark.parametrize(
    "style",
    [
        {"rope_theta": 100, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 100, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 100, **YARN}},
    ],
    ids=["oldest", "older", "newer"],
)
def test_both_styles_of_rotary_settings(style: dict[str, Any]) -> None:
    config = from_huggingface(V3 | style)
    assert config.rope == RopeConfig(
        theta=100.0,
        scaling="yarn",
        factor=40.0,
        original_max_position_embeddings=16,
        beta_fast=16.0,
        beta_slow=2.0,
        mscale=0.7,
        mscale_all_dim=0.5,
    )
    assert from_huggingface(to_huggingface(config, "float32")) == config


def test_pairs_are_interleaved_for_deepseek_alone_unless_told() -> None:
    assert from_huggingface(V3).rope.interleaved
    assert not from_huggingface(V3 | {"rope_interleave": False}).rope.interleaved
    assert not from_huggingface(LLAMA).rope.interleaved


def test_v2_normalises_instead_of_scaling() -> None:
    moe = from_huggingface(V2 | {"norm_topk_prob": True, "routed_scaling_factor": 16.0}).moe
    assert (moe.norm_topk_prob, moe.routed_scaling_factor) == (True, 1.0)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            {"model_type": "gpt2"},
            "config.json has model_type 'gpt2'; supported are deepseek_v3, deepseek_v2, mixtral, "
            "llama",
        ),
        (
            V3 | {"topk_method": "best"},
            "config.json has topk_method 'best'; supported for model_type 'deepseek_v3' are "
            "noaux_tc",
        ),
        (
            V2 | {"scoring_func": "sigmoid"},
            "config.json has scoring_func 'sigmoid'; supported for model_type 'deepseek_v2' are "
            "softmax",
        ),
        (
            LLAMA | {"rope_scaling": {"rope_type": "longrope"}},
            "config.json has rotary scaling 'longrope'; supported are default, yarn and llama3",
        ),
        (
            LLAMA | {"attention_bias": True},
            "config.json has attention_bias=True; supported is False",
        ),
        (
            MIXTRAL | {"sliding_window": 4096},
            "config.json has sliding_window=4096; supported is None",
        ),
        (
            LLAMA | {"hidden_size": "16"},
            "config.json has hidden_size='16', which is of the wrong type",
        ),
        (
            LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": [8]}},
            "config.json has factor=[8], which is of the wrong type",
        ),
        (
            V3 | {"n_group": 3},
            "config.json describes no model: config.model.moe.num_experts=4 must be a multiple of "
            "config.model.moe.num_expert_groups=3: groups are equal",
        ),
        (
            {name: value for name, value in V3.items() if name != "kv_lora_rank"},
            "config.json of model_type 'deepseek_v3' has no kv_lora_rank",
        ),
        (
            {name: value for name, value in MIXTRAL.items() if name != "rope_theta"},
            "config.json of model_type 'mixtral' has no rope_theta",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_supported_is_named(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        from_huggingface(raw)
    assert str(error.value) == sentence


def test_options_that_no_family_has_are_not_written() -> None:
    config = from_huggingface(MIXTRAL)
    moe = dataclasses.replace(config.moe, norm_topk_prob=False, num_shared_experts=1)
    with pytest.raises(UserError) as error:
        to_huggingface(dataclasses.replace(config, moe=moe), "float32")
    assert str(error.value) == (
        "to be written as model_type 'mixtral', config.model.moe.norm_topk_prob=False must be True "
        "and config.model.moe.num_shared_experts=1 must be 0"
    )
