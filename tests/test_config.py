"""The mutable form that config files change, and what it leaves to the check."""

import dataclasses

import pytest

from moe_jax import validation
from moe_jax.config import Config, default_config, field_names
from moe_jax.fields import to_dict


def test_the_default_config_is_every_default() -> None:
    assert validation.parse(default_config()) == Config()
    assert default_config().to_dict().keys() == {f.name for f in dataclasses.fields(Config)}


def test_a_config_file_changes_fields_and_can_add_none() -> None:
    raw = default_config()
    raw.training.num_steps = 7
    raw.training.stop_after_step = 5
    raw.model.attention.q_lora_rank = None
    raw.data.stages = ({"sequence_length": 128, "until_tokens": 8192}, {"sequence_length": 256})
    raw.optimizer.warmup_steps = 0
    config = validation.parse(raw)
    assert (config.training.num_steps, config.training.stop_after_step) == (7, 5)
    assert config.model.attention.q_lora_rank is None
    assert [(stage.sequence_length, stage.until_tokens) for stage in config.data.stages] == [
        (128, 8192),
        (256, None),
    ]
    with pytest.raises(AttributeError, match='Did you mean "num_steps"'):
        raw.training.num_stepz = 3
    with pytest.raises(TypeError):
        raw.training.num_steps = 3.5


def test_default_configs_share_nothing() -> None:
    default_config().model.moe.num_experts = 99
    assert validation.parse(default_config()) == Config()


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore


def test_the_plain_form_is_lists_and_dicts() -> None:
    plain = to_dict(Config())
    assert plain["data"]["stages"][0]["sequence_length"] == 256
    assert plain["model"]["moe"]["num_experts"] == 16


def test_names_of_a_group() -> None:
    assert field_names("config.profile") == ["steps"]
    assert "moe" in field_names("config.model")
    for path in ("config.seed", "config.nothing", "config.seed.deeper", "config.data.stages"):
        assert field_names(path) == []
