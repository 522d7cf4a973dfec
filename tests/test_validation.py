"""Every config that cannot run is refused in one sentence that names fields and values."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from raw_configs import CONFIGS, load, raw, refusal

from moe_jax import validation
from moe_jax.config import MESH_AXES, Config, Stage
from moe_jax.fields import build, to_dict


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_every_config_is_valid_and_comes_back_from_json(file: Path) -> None:
    config = validation.parse(load(file))
    assert build(Config, to_dict(config)) == config


def test_a_config_dict_and_its_mapping_are_the_same_config() -> None:
    raw = load(CONFIGS / "tiny.py")
    assert validation.parse(raw.to_dict()) == validation.parse(raw)


def _fields(group: str, *names: str) -> list[str]:
    return [f"{group}.{name}" for name in names]


AT_LEAST_1 = [
    *_fields("mesh", "num_cpu_devices"),
    *_fields(
        "model",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "max_position_embeddings",
    ),
    *_fields(
        "model.attention",
        "num_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "num_key_value_heads",
        "head_dim",
    ),
    *_fields("model.rope", "original_max_position_embeddings"),
    *_fields(
        "model.moe",
        "num_experts",
        "num_experts_per_tok",
        "intermediate_size",
        "num_expert_groups",
        "num_limited_groups",
        "num_device_groups",
        "capacity_group",
        "exchange_parts",
    ),
    *_fields(
        "training",
        "tokens_per_step",
        "micro_batches",
        "stop_after_step",
        "log_every_steps",
        "eval_every_steps",
    ),
    *_fields("data", "num_streams", "packing_bins"),
    *_fields("checkpoint", "every_steps", "keep", "max_failed_saves"),
    *_fields("recovery", "spike_window"),
]
AT_LEAST_0 = [
    "seed",
    *_fields("model", "first_k_dense_replace", "num_nextn_predict_layers"),
    *_fields("model.moe", "num_shared_experts"),
    *_fields("data", "holdout_every", "prefetch"),
    *_fields("training", "num_steps", "eval_batches", "sample_tokens"),
    *_fields("optimizer", "warmup_steps"),
    *_fields("checkpoint", "keep_every_steps", "keep_best"),
    *_fields("recovery", "max_bad_steps", "max_rollbacks"),
    *_fields("collapse", "dead_steps"),
    *_fields("debug", "determinism_check"),
]
FLOATS_AT_LEAST_0 = [
    *_fields("model", "rms_norm_eps", "initializer_range"),
    *_fields("model.moe", "routed_scaling_factor", "bias_update_speed", "sequence_loss_weight"),
    *_fields("model.moe", "expert_loss_weight", "device_loss_weight", "switch_loss_weight"),
    *_fields("model.moe", "communication_loss_weight", "mixtral_loss_weight", "z_loss_weight"),
    *_fields("training", "mtp_loss_weight"),
    "precision.fp8_error_bound",
    *_fields("optimizer", "peak_lr", "final_lr", "weight_decay"),
    *_fields("checkpoint", "every_minutes"),
    *_fields("recovery", "spike_sigmas", "watchdog_minutes"),
    *_fields("collapse", "max_violation", "min_entropy"),
]
FLOATS_AT_LEAST_1 = ["model.rope.factor", "model.moe.buffer_factor"]
FLOATS_WITH_OTHER_BOUNDS = [
    *_fields("optimizer", "b1", "b2", "eps", "clip_norm", "ema_decay"),
    *_fields("model.rope", "theta", "beta_fast", "beta_slow"),
    *_fields("model.rope", "low_freq_factor", "high_freq_factor"),
    *_fields("model.moe", "capacity_factor", "undropped_sequences"),
    "training.recipe_scale",
    *_fields("data", "fim_rate", "fim_spm_rate"),
]
FLOATS = [*FLOATS_AT_LEAST_0, *FLOATS_AT_LEAST_1, *FLOATS_WITH_OTHER_BOUNDS]


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [(field, 0, 1) for field in AT_LEAST_1]
    + [(field, -1, 0) for field in AT_LEAST_0]
    + [(field, -1e-9, 0) for field in FLOATS_AT_LEAST_0]
    + [(field, 0.99, 1) for field in FLOATS_AT_LEAST_1],
)
def test_lower_bounds(field: str, value: float, bound: int) -> None:
    assert refusal({field: value}) == f"config.{field}={value} must be at least {bound}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", FLOATS)
def test_numbers_are_finite(field: str, value: float) -> None:
    assert refusal({field: value}) == f"config.{field}={value} must be a finite number"


def test_the_lists_above_are_all_numbers_there_are() -> None:
    def numbers(value: Any, path: str) -> dict[str, type]:
        if isinstance(value, dict):
            items = [numbers(item, f"{path}.{name}") for name, item in value.items()]
            return {name: kind for item in items for name, kind in item.items()}
        return {path[1:]: type(value)} if type(value) in (int, float) else {}

    found = numbers(raw({"training.stop_after_step": 1}), "")
    axes = {f"mesh.{axis}" for axis in MESH_AXES}
    assert {name for name, kind in found.items() if kind is int} == {
        *AT_LEAST_1,
        *AT_LEAST_0,
        *axes,
    }
    assert {name for name, kind in found.items() if kind is float} == set(FLOATS)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seed": True}, "config.seed must be of type int, not True"),
        ({"training.num_steps": "240"}, "config.training.num_steps must be of type int, not '240'"),
        ({"training.num_steps": 2.0}, "config.training.num_steps must be of type int, not 2.0"),
        ({"training.num_steps": None}, "config.training.num_steps must be of type int, not None"),
        ({"optimizer.b1": "0.9"}, "config.optimizer.b1 must be of type float, not '0.9'"),
        ({"optimizer.b1": False}, "config.optimizer.b1 must be of type float, not False"),
        ({"data.mask_documents": 1}, "config.data.mask_documents must be of type bool, not 1"),
        ({"data.text_field": None}, "config.data.text_field must be of type str, not None"),
        (
            {"model.attention.q_lora_rank": 1.5},
            "config.model.attention.q_lora_rank must be of type int or None, not 1.5",
        ),
        (
            {"training.stop_after_step": True},
            "config.training.stop_after_step must be of type int or None, not True",
        ),
        ({"model": 5}, "config.model must be a group of fields, not 5"),
        ({"data.stages": 128}, "config.data.stages must be a tuple of stages, not 128"),
        ({"data.stages": ()}, "config.data.stages must be a tuple of stages, not ()"),
        ({"data.stages": (128,)}, "config.data.stages[0] must be a group of fields, not 128"),
        (
            {"data.stages": ({"sequence_length": "128"},)},
            "config.data.stages[0].sequence_length must be of type int, not '128'",
        ),
    ],
    ids=str,
)
def test_wrong_types(fields: dict[str, Any], sentence: str) -> None:
    assert refusal(fields) == sentence


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"model.moe.num_expert": 8},
            "config.model.moe.num_expert does not exist; did you mean "
            "config.model.moe.num_experts?",
        ),
        ({"sed": 1}, "config.sed does not exist; did you mean config.seed?"),
        (
            {"data.stages": ({"sequence_length": 128, "until_token": 1}, {})},
            "config.data.stages[0].until_token does not exist; did you mean "
            "config.data.stages[0].until_tokens?",
        ),
        (
            {"checkpoint.zzz": 1},
            "config.checkpoint.zzz does not exist; config.checkpoint has every_steps, "
            "every_minutes, keep, keep_every_steps, keep_best, max_failed_saves",
        ),
        (
            {"data.stages": ({}, {"zzz": 1})},
            "config.data.stages[1].zzz does not exist; config.data.stages[1] has "
            f"{', '.join(f.name for f in dataclasses.fields(Stage))}",
        ),
    ],
    ids=str,
)
def test_fields_that_do_not_exist(fields: dict[str, Any], sentence: str) -> None:
    assert refusal(fields) == sentence


@pytest.mark.parametrize(
    "fields",
    [
        {"model.moe.capacity_group": 64},  # nothing is dropped
        {"model.moe.token_dropping": "expert", "model.moe.capacity_group": None},
        {"model.moe.token_dropping": "device", "model.moe.capacity_group": 16},
        {"model.moe.topk_method": "greedy", "model.moe.num_limited_groups": 4},
        {"model.moe.communication_loss_weight": 0.1, "model.moe.num_device_groups": 4},
        {"model.attention.num_key_value_heads": 3},  # of the other kind of attention
        {"model.num_nextn_predict_layers": 127, "model.rope.mscale": None},
    ],
    ids=str,
)
def test_what_is_allowed(fields: dict[str, Any]) -> None:
    validation.parse(raw(fields))


def test_what_is_missing_is_at_its_default() -> None:
    assert validation.parse({}) == Config()
    assert validation.parse({"model": {"vocab_size": 300}}).model.vocab_size == 300


@pytest.mark.parametrize(
    ("text", "steps"), [("", []), ("10:13", [10, 11, 12]), ("1:2", [1]), ("239:241", [239, 240])]
)
def test_profiled_steps(text: str, steps: list[int]) -> None:
    config = validation.parse(raw({"profile.steps": text}))
    assert list(validation.profile_steps(config)) == steps
