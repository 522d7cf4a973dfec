"""Every config that cannot run is refused in one sentence that names fields and values."""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from moe_jax import sharding, validation
from moe_jax.config import MESH_AXES, Config, MeshConfig, UserError, build, to_dict

CONFIGS = Path(validation.__file__).parents[1] / "configs"
# What sentences below say of configs/tiny.py, so that it can be tuned.
TINY = {
    "model.num_hidden_layers": 4,
    "model.max_position_embeddings": 512,
    "model.moe.num_experts": 16,
    "model.moe.num_experts_per_tok": 4,
    "model.moe.num_expert_groups": 4,
    "model.moe.num_limited_groups": 2,
    "optimizer.peak_lr": 4e-3,
    "optimizer.final_lr": 2e-4,
    "optimizer.warmup_steps": 20,
    "data.num_streams": 8,
    "data.stages": (
        {"sequence_length": 128, "tokens": 60 * 4096},
        {"sequence_length": 256, "tokens": None},
    ),
    "training.num_steps": 240,
    "training.tokens_per_step": 4096,
    "training.micro_batches": 1,
    "training.sample_prompt": "def ",
}


def _load(file: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _raw(fields: dict[str, Any]) -> dict[str, Any]:
    """What configs/tiny.py gives, changed: {"model.vocab_size": 0}."""
    raw = _load(CONFIGS / "tiny.py").to_dict()
    for name, value in (TINY | fields).items():
        group = raw
        *path, last = name.split(".")
        for part in path:
            group = group[part]
        group[last] = value
    return raw


def _refusal(fields: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        validation.parse(_raw(fields))
    return str(error.value)


def _stages(*stages: tuple[int, int | None]) -> tuple[dict[str, Any], ...]:
    return tuple({"sequence_length": length, "tokens": tokens} for length, tokens in stages)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_every_config_is_valid_and_comes_back_from_json(file: Path) -> None:
    config = validation.parse(_load(file))
    assert build(Config, to_dict(config)) == config


def test_a_config_dict_and_its_mapping_are_the_same_config() -> None:
    raw = _load(CONFIGS / "tiny.py")
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
    ),
    *_fields(
        "training",
        "tokens_per_step",
        "micro_batches",
        "num_steps",
        "stop_after_step",
        "log_every_steps",
        "eval_every_steps",
    ),
    *_fields("data", "num_streams", "packing_bins"),
    *_fields("checkpoint", "every_steps", "keep"),
]
AT_LEAST_0 = [
    "seed",
    *_fields("model", "first_k_dense_replace", "num_nextn_predict_layers"),
    *_fields("model.moe", "num_shared_experts"),
    *_fields("data", "holdout_every", "prefetch"),
    *_fields("training", "eval_batches", "sample_tokens"),
    *_fields("optimizer", "warmup_steps"),
]
FLOATS_AT_LEAST_0 = [
    *_fields("model", "rms_norm_eps", "initializer_range"),
    *_fields("model.moe", "routed_scaling_factor", "bias_update_speed", "sequence_loss_weight"),
    *_fields("model.moe", "expert_loss_weight", "device_loss_weight", "switch_loss_weight"),
    *_fields("model.moe", "communication_loss_weight", "mixtral_loss_weight", "z_loss_weight"),
    *_fields("training", "mtp_loss_weight", "mtp_late_loss_weight"),
    *_fields("optimizer", "peak_lr", "final_lr", "weight_decay"),
]
FLOATS_AT_LEAST_1 = ["model.rope.factor", "model.moe.buffer_factor"]
FLOATS_WITH_OTHER_BOUNDS = [
    *_fields("optimizer", "b1", "b2", "eps", "clip_norm", "ema_decay"),
    *_fields("model.rope", "theta", "beta_fast", "beta_slow"),
    *_fields("model.rope", "low_freq_factor", "high_freq_factor"),
    *_fields("model.moe", "capacity_factor", "undropped_sequences"),
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
    assert _refusal({field: value}) == f"config.{field}={value} must be at least {bound}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", FLOATS)
def test_numbers_are_finite(field: str, value: float) -> None:
    assert _refusal({field: value}) == f"config.{field}={value} must be a finite number"


def test_the_lists_above_are_all_numbers_there_are() -> None:
    def numbers(value: Any, path: str) -> dict[str, type]:
        if isinstance(value, dict):
            items = [numbers(item, f"{path}.{name}") for name, item in value.items()]
            return {name: kind for item in items for name, kind in item.items()}
        return {path[1:]: type(value)} if type(value) in (int, float) else {}

    found = numbers(_raw({"training.stop_after_step": 1}), "")
    axes = {f"mesh.{axis}" for axis in MESH_AXES}
    assert {name for name, kind in found.items() if kind is int} == {
        *AT_LEAST_1,
        *AT_LEAST_0,
        *axes,
    }
    assert {name for name, kind in found.items() if kind is float} == set(FLOATS)


# Changed fields -> the sentence.
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"mesh.data": 0},
        "config.mesh.data=0 must be at least 1, or -1 for the devices that are left",
    ),
    (
        {"mesh.data": -1, "mesh.fsdp": -1},
        "only one mesh axis may be -1, but config.mesh.data and config.mesh.fsdp are",
    ),
    *(
        (
            {f"mesh.{axis}": size},
            f"config.mesh.{axis}={size} is not implemented yet and must be 1; use data, fsdp, "
            "expert_outer and expert",
        )
        for axis, size in (("tensor", 2), ("context", 2), ("pipeline", 2))
    ),
    (
        {"model.first_k_dense_replace": 5},
        "config.model.first_k_dense_replace=5 must not exceed config.model.num_hidden_layers=4",
    ),
    *(
        ({f"model.{field}": "other"}, f"config.model.{field}='other' must be one of {options}")
        for field, options in (
            ("initializer", "normal, fan_in"),
            ("attention.kind", "latent, grouped_query"),
            ("rope.scaling", "none, yarn, llama3"),
            ("moe.scoring_func", "sigmoid, softmax"),
            ("moe.topk_method", "noaux_tc, group_limited_greedy, greedy"),
            ("moe.token_dropping", "none, expert, device"),
        )
    ),
    (
        {"model.attention.kind": "grouped_query", "model.attention.num_key_value_heads": 3},
        "config.model.attention.num_heads=4 must be a multiple of "
        "config.model.attention.num_key_value_heads=3: as many query heads share each of them",
    ),
    (
        {"model.attention.kind": "grouped_query", "model.attention.head_dim": 9},
        "config.model.attention.head_dim=9 must be even: rotary dims go in pairs",
    ),
    ({"model.rope.theta": 1.0}, "config.model.rope.theta=1.0 must be above 1"),
    (
        {"model.rope.beta_slow": 32.0},
        "config.model.rope.beta_slow=32.0 must be above 0 and below config.model.rope."
        "beta_fast=32.0",
    ),
    (
        {"model.rope.high_freq_factor": 0.5},
        "config.model.rope.low_freq_factor=1.0 must be above 0 and below config.model.rope."
        "high_freq_factor=0.5",
    ),
    (
        {"model.moe.num_device_groups": 3},
        "config.model.moe.num_experts=16 must be a multiple of config.model.moe."
        "num_device_groups=3: groups are equal",
    ),
    (
        {"model.moe.topk_method": "greedy"},
        "config.model.moe.topk_method='greedy' knows no groups, so config.model.moe."
        "num_limited_groups=2 must be config.model.moe.num_expert_groups=4",
    ),
    (
        {"model.moe.communication_loss_weight": 0.1},
        "config.model.moe.num_device_groups=1 must be config.model.moe.num_expert_groups=4 for "
        "the communication loss, which counts the groups that a token is sent to",
    ),
    (
        {"model.moe.capacity_factor": 0.0},
        "config.model.moe.capacity_factor=0.0 must be above 0",
    ),
    (
        {"model.moe.undropped_sequences": 1.5},
        "config.model.moe.undropped_sequences=1.5 must be between 0 and 1",
    ),
    (
        {"model.moe.token_dropping": "expert", "model.moe.capacity_group": 64},
        "the 32 rows of a micro-batch in config.data.stages[0] must be a multiple of "
        "config.model.moe.capacity_group=64",
    ),
    (
        {"model.num_nextn_predict_layers": 300},
        "config.model.num_nextn_predict_layers=300 must be below config.data.stages[0]."
        "sequence_length=128",
    ),
    (
        {"model.attention.qk_rope_head_dim": 15},
        "config.model.attention.qk_rope_head_dim=15 must be even: rotary dims go in pairs",
    ),
    (
        {"model.moe.num_experts_per_tok": 17},
        "config.model.moe.num_experts_per_tok=17 must not exceed config.model.moe.num_experts=16",
    ),
    (
        {"model.moe.num_expert_groups": 3},
        "config.model.moe.num_experts=16 must be a multiple of "
        "config.model.moe.num_expert_groups=3: groups are equal",
    ),
    (
        {"model.moe.num_limited_groups": 5},
        "config.model.moe.num_limited_groups=5 must not exceed "
        "config.model.moe.num_expert_groups=4",
    ),
    (
        {"model.moe.num_experts_per_tok": 9},
        "config.model.moe.num_experts_per_tok=9 exceeds the 8 experts of "
        "config.model.moe.num_limited_groups=2 groups",
    ),
    (
        {"precision.compute_dtype": "float16"},
        "config.precision.compute_dtype='float16' must be one of float32, bfloat16",
    ),
    (
        {"precision.combine_dtype": "bf16"},
        "config.precision.combine_dtype='bf16' must be one of float32, bfloat16",
    ),
    (
        {"data.holdout_every": 1},
        "config.data.holdout_every=1 would hold out every document; 0 holds out none",
    ),
    (
        {"data.source": ""},
        "config.data.source='' is empty; give 'stdlib' or a glob of .jsonl and text files",
    ),
    (
        {"data.stages": _stages((0, None))},
        "config.data.stages[0].sequence_length=0 must be at least 1",
    ),
    (
        {"data.stages": _stages((128, 4096), (1024, None))},
        "config.data.stages[1].sequence_length=1024 exceeds "
        "config.model.max_position_embeddings=512",
    ),
    (
        {"data.stages": _stages((96, None))},
        "config.training.tokens_per_step=4096 must be a multiple of "
        "config.data.stages[0].sequence_length=96",
    ),
    (
        {"data.num_streams": 32},
        "the 16 rows of config.data.stages[1] (4096 tokens / 256) must be a multiple of "
        "config.data.num_streams=32",
    ),
    (
        {"training.micro_batches": 3},
        "the 32 rows of config.data.stages[0] (4096 tokens / 128) must be a multiple of "
        "config.training.micro_batches=3",
    ),
    (
        {"data.stages": _stages((128, 4096), (256, 4096))},
        "config.data.stages[1].tokens=4096 must be None: the last stage lasts to the end",
    ),
    (
        {"data.stages": _stages((128, None), (256, None))},
        "config.data.stages[0].tokens=None must be at least 1: another stage follows",
    ),
    (
        {"data.stages": _stages((128, 0), (256, None))},
        "config.data.stages[0].tokens=0 must be at least 1: another stage follows",
    ),
    ({"seed": 2**63}, "config.seed=9223372036854775808 must be below 2**63"),
    (
        {"training.stop_after_step": 241},
        "config.training.stop_after_step=241 must not exceed config.training.num_steps=240",
    ),
    (
        {"training.rematerialization": "some"},
        "config.training.rematerialization='some' must be one of none, full",
    ),
    (
        {"optimizer.final_lr": 0.1},
        "config.optimizer.final_lr=0.1 must not exceed config.optimizer.peak_lr=0.004",
    ),
    ({"optimizer.clip_norm": 0.0}, "config.optimizer.clip_norm=0.0 must be above 0"),
    ({"optimizer.eps": 0.0}, "config.optimizer.eps=0.0 must be above 0"),
    ({"optimizer.b1": 1.0}, "config.optimizer.b1=1.0 must be in [0, 1)"),
    ({"optimizer.b2": -0.1}, "config.optimizer.b2=-0.1 must be in [0, 1)"),
    ({"optimizer.ema_decay": 1.5}, "config.optimizer.ema_decay=1.5 must be in [0, 1)"),
    (
        {"training.sample_tokens": 508},
        "config.training.sample_tokens=508 after the 5 tokens of config.training.sample_prompt "
        "exceeds config.model.max_position_embeddings=512",
    ),
    *(
        (
            {"profile.steps": text},
            f"config.profile.steps='{text}' must be two steps with a colon between, as in 10:13",
        )
        for text in ("5", "5:", ":5", "5:5", "6:5", "0:5", "-1:5", "a:b", "1:2:3", "1.0:2")
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=[str(f) for f, _ in REFUSED])
def test_combinations_that_cannot_run(fields: dict[str, Any], sentence: str) -> None:
    assert _refusal(fields) == sentence


@pytest.mark.parametrize(
    "fields",
    [
        {"mesh.expert": -1, "mesh.fsdp": 8},
        {"model.first_k_dense_replace": 4},
        {"model.attention.q_lora_rank": None},
        {"model.moe.num_experts_per_tok": 8},
        {"model.moe.num_experts_per_tok": 16, "model.moe.num_limited_groups": 4},
        {"data.holdout_every": 0},
        {"data.stages": [{}]},
        {"data.num_streams": 16, "training.micro_batches": 16},
        {"training.stop_after_step": 240, "optimizer.warmup_steps": 241},
        {"optimizer.peak_lr": 1, "optimizer.final_lr": 1},  # an int for a float
        {"optimizer.b1": 0.0, "optimizer.ema_decay": 0.9999},
        {"training.sample_tokens": 507},
        {"training.sample_tokens": 0, "training.sample_prompt": "x" * 600},
        {"profile.steps": "1:2"},
        {"seed": 2**63 - 1},
    ],
    ids=str,
)
def test_what_is_just_within_the_bounds_is_accepted(fields: dict[str, Any]) -> None:
    config = validation.parse(_raw(fields))
    assert build(Config, to_dict(config)) == config


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
        ({"data.source": None}, "config.data.source must be of type str, not None"),
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
    assert _refusal(fields) == sentence


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
            {"data.stages": ({"sequence_length": 128, "token": 1}, {})},
            "config.data.stages[0].token does not exist; did you mean "
            "config.data.stages[0].tokens?",
        ),
        (
            {"checkpoint.zzz": 1},
            "config.checkpoint.zzz does not exist; config.checkpoint has every_steps, keep",
        ),
        (
            {"data.stages": ({}, {"zzz": 1})},
            "config.data.stages[1].zzz does not exist; config.data.stages[1] has "
            "sequence_length, tokens",
        ),
    ],
    ids=str,
)
def test_fields_that_do_not_exist(fields: dict[str, Any], sentence: str) -> None:
    assert _refusal(fields) == sentence


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
    validation.parse(_raw(fields))


def test_what_is_missing_is_at_its_default() -> None:
    assert validation.parse({}) == Config()
    assert validation.parse({"model": {"vocab_size": 300}}).model.vocab_size == 300


def _sizes(**axes: int) -> dict[str, int]:
    return dict.fromkeys(MESH_AXES, 1) | axes


def test_experts_divide_over_the_mesh() -> None:
    config = validation.parse(_raw({}))
    validation.check_mesh(config, _sizes(fsdp=2, expert=4))
    validation.check_mesh(config, _sizes(expert_outer=4, expert=4))
    with pytest.raises(UserError) as error:
        validation.check_mesh(config, _sizes(expert_outer=2, expert=3))
    assert str(error.value) == (
        "config.model.moe.num_experts=16 must be a multiple of the 6 devices of "
        "config.mesh.expert_outer=2 times config.mesh.expert=3"
    )


@pytest.mark.parametrize(
    ("fields", "axes", "rows", "stage", "length", "micro", "devices"),
    [
        ({}, {"data": 32}, 16, 1, 256, 1, 32),
        ({}, {"data": 3}, 32, 0, 128, 1, 3),
        ({"training.micro_batches": 4}, {"data": 2, "fsdp": 2, "expert": 2}, 4, 1, 256, 4, 8),
        ({"training.micro_batches": 16}, {"expert_outer": 2}, 1, 1, 256, 16, 2),
    ],
)
def test_rows_of_a_micro_batch_divide_over_the_mesh(
    fields: dict[str, Any],
    axes: dict[str, int],
    rows: int,
    stage: int,
    length: int,
    micro: int,
    devices: int,
) -> None:
    with pytest.raises(UserError) as error:
        validation.check_mesh(validation.parse(_raw(fields)), _sizes(**axes))
    assert str(error.value) == (
        f"the {rows} rows of a micro-batch in config.data.stages[{stage}] "
        f"(config.training.tokens_per_step=4096 / sequence_length={length} / "
        f"config.training.micro_batches={micro}) must be a multiple of the {devices} devices that "
        "the batch is split over (data * fsdp * expert_outer * expert)"
    )


def test_devices_that_the_mesh_does_not_divide() -> None:
    mesh = MeshConfig(num_cpu_devices=8, fsdp=-1, expert=3)
    with pytest.raises(UserError, match=re.escape("(fsdp=-1 * expert=3) does not fit 8 devices")):
        sharding.mesh_sizes(mesh, mesh.num_cpu_devices)


@pytest.mark.parametrize(
    ("text", "steps"), [("", []), ("10:13", [10, 11, 12]), ("1:2", [1]), ("239:241", [239, 240])]
)
def test_profiled_steps(text: str, steps: list[int]) -> None:
    config = validation.parse(_raw({"profile.steps": text}))
    assert list(validation.profile_steps(config)) == steps
