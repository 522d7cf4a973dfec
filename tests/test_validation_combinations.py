"""Fields that cannot run together, and the sentence for each."""

from typing import Any

import pytest
from raw_configs import raw, refusal, sources, stages

from moe_jax import validation
from moe_jax.config import Config
from moe_jax.fields import build, to_dict

NO_RATE = dict.fromkeys(f"optimizer.{n}" for n in ("peak_lr", "final_lr", "warmup_steps"))
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
        "config.data.source='' is empty; give 'stdlib', a glob of files or a folder",
    ),
    (
        {"data.source": sources(("a", 0.5), ("", 0.5))},
        "config.data.source[1].path='' is empty; give 'stdlib', a glob of files or a folder",
    ),
    (
        {"data.source": sources(("a", 0.5), ("b", 0.4))},
        "the weights of config.data.source, 0.5 + 0.4 = 0.9, must sum to 1",
    ),
    (
        {"data.source": sources(("a", 1.5), ("b", -0.5))},
        "config.data.source[1].weight=-0.5 must be above 0",
    ),
    (
        {"data.source": ({"path": "a", "epochs": 0.0},)},
        "config.data.source[0].epochs=0.0 must be above 0",
    ),
    ({"data.source": ()}, "config.data.source must be a tuple of sources, not ()"),
    (
        {"data.source": ({"path": "a", "wieght": 1.0},)},
        "config.data.source[0].wieght does not exist; did you mean config.data.source[0].weight?",
    ),
    ({"data.source": 3}, "config.data.source must be of type str or a tuple of sources, not 3"),
    (
        {"data.records": "chat"},
        "config.data.records='chat' must be one of text, chats, pairs",
    ),
    (
        {"data.message_format": "{role}"},
        "config.data.message_format='{role}' must have {content} once",
    ),
    (
        {"data.benchmark_ngrams": "words:0"},
        "config.data.benchmark_ngrams='words:0' must be words:13, characters:50 or the like",
    ),
    ({"data.fim_rate": 1.5}, "config.data.fim_rate=1.5 must be between 0 and 1"),
    ({"data.fim_spm_rate": -0.1}, "config.data.fim_spm_rate=-0.1 must be between 0 and 1"),
    (
        {"data.fim_rate": 0.5, "data.records": "pairs"},
        "config.data.fim_rate=0.5 must be 0 for config.data.records='pairs', whose answers come "
        "last",
    ),
    (
        {"data.stages": stages((0, None))},
        "config.data.stages[0].sequence_length=0 must be at least 1",
    ),
    (
        {"data.stages": stages((128, 4096), (1024, None))},
        "config.data.stages[1].sequence_length=1024 exceeds "
        "config.model.max_position_embeddings=512",
    ),
    (
        {"data.stages": stages((96, None))},
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
        {"training.num_steps": 0},
        "config.training.num_steps=0 ends the run with the last stage, so config.data.stages[1]."
        "until_tokens=None must be a number",
    ),
    *(
        (
            {"training.recipe_scale": scale},
            f"config.training.recipe_scale={scale} must be above 0 and at most 1, the whole recipe",
        )
        for scale in (0.0, -1.0, 1.5, 1e300)
    ),
    *(
        (
            {"training.recipe_scale": scale},
            f"config.training.recipe_scale={scale} must be a finite number",
        )
        for scale in (float("nan"), float("inf"))
    ),
    (
        {"data.stages": stages((128, 8192), (256, 8192), (128, None))},
        "config.data.stages[1].until_tokens=8192 must be above that of config.data.stages[0], 8192",
    ),
    *(
        (
            {"data.stages": ({"until_tokens": 8192, **fields}, {})},
            f"config.data.stages[0].{sentence}",
        )
        for fields, sentence in (
            ({"tokens_per_step": 0}, "tokens_per_step=0 must be at least 1"),
            ({"micro_batches": 0}, "micro_batches=0 must be at least 1"),
            ({"rope_factor": 0.5}, "rope_factor=0.5 must be at least 1"),
            ({"learning_rate_factor": -1}, "learning_rate_factor=-1.0 must be at least 0"),
            ({"ramp_shapes": 1}, "ramp_shapes=1 must be at least 2"),
            ({"ramp": "cubic"}, "ramp='cubic' must be one of linear, sqrt"),
            (
                {"weights": (0.5, 0.5)},
                "weights=(0.5, 0.5) must be 1, one for each source of config.data.source",
            ),
            ({"weights": (-1,)}, "weights=(-1.0,) must be at least 0"),
            ({"weights": (0.7,)}, "weights, 0.7 = 0.7, must sum to 1"),
            ({"weights": ()}, "weights must be a tuple of floats, not ()"),
            ({"weights": ("a",)}, "weights[0] must be of type float, not 'a'"),
            (
                {"from_sequence_length": 128, "until_tokens": None},
                "until_tokens=None must be a number: a ramp has an end",
            ),
            (
                {"tokens_per_step": 1000},
                "tokens_per_step=1000 must be a multiple of config.data.stages[0]."
                "sequence_length=256",
            ),
        )
    ),
    (
        {"data.stages": ({"until_tokens": 9, "from_sequence_length": 384}, {})},
        "the 4096 tokens a step from which config.data.stages[0] ramps must be a multiple of the "
        "length 384 from which it does",
    ),
    (
        {"data.stages": ({"tokens_per_step": 1536 * 256, "micro_batches": 5},)},
        "the 1536 rows of config.data.stages[0] (393216 tokens / 256) must be a multiple of its 5 "
        "micro-batches",
    ),
    (
        {"data.stages": ({"rope_factor": 4.0},), "model.rope.scaling": "llama3"},
        "config.data.stages[0].rope_factor=4.0 is YaRN's, and config.model.rope.scaling='llama3' "
        "is another; set one of them",
    ),
    (
        {"data.stages": stages((128, None), (256, None))},
        "config.data.stages[0].until_tokens=None must be a number: config.data.stages[1] follows",
    ),
    (
        {"data.stages": stages((128, 0), (256, None))},
        "config.data.stages[0].until_tokens=0 must be above 0",
    ),
    ({"seed": 2**63}, "config.seed=9223372036854775808 must be below 2**63"),
    (
        {"training.stop_after_step": 241},
        "config.training.stop_after_step=241 must not exceed config.training.num_steps=240",
    ),
    (
        {"training.rematerialization": "some"},
        "config.training.rematerialization='some' must be one of none, minimal, latent, full",
    ),
    (
        {"optimizer.final_lr": 0.1},
        "config.optimizer.final_lr=0.1 must not exceed config.optimizer.peak_lr=0.004",
    ),
    (
        {"optimizer.lr_phases": ({"value": 0.1},)},
        "config.optimizer.peak_lr=0.004 must be None: config.optimizer.lr_phases stands in its "
        "place",
    ),
    (
        {"optimizer.warmup_steps": None},
        "config.optimizer.warmup_steps=None must be a number where config.optimizer.lr_phases is "
        "None",
    ),
    (
        {**NO_RATE, "optimizer.lr_phases": ({"value": -0.1},)},
        "config.optimizer.lr_phases[0].value=-0.1 must be at least 0",
    ),
    (
        {"model.moe.bias_update_speed": ({"value": 0.1, "kind": "sine"},)},
        "config.model.moe.bias_update_speed[0].kind='sine' must be one of constant, linear, cosine",
    ),
    (
        {"training.mtp_loss_weight": ({"value": 0.3}, {"value": 0.1})},
        "config.training.mtp_loss_weight[0].until_tokens=None must be a number: "
        "config.training.mtp_loss_weight[1] follows",
    ),
    (
        {"training.mtp_loss_weight": ({"until_tokens": 0}, {})},
        "config.training.mtp_loss_weight[0].until_tokens=0 must be above 0",
    ),
    (
        {"training.mtp_loss_weight": ({"until_tokens": 9}, {"until_tokens": 8})},
        "config.training.mtp_loss_weight[1].until_tokens=8 must be above that of "
        "config.training.mtp_loss_weight[0], 9",
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
    assert refusal(fields) == sentence


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
        {**NO_RATE, "optimizer.lr_phases": ({"value": 1, "until_tokens": 5, "kind": "linear"}, {})},
        {"optimizer.b1": 0.0, "optimizer.ema_decay": 0.9999},
        {"training.sample_tokens": 507},
        {"training.sample_tokens": 0, "training.sample_prompt": "x" * 600},
        {"profile.steps": "1:2"},
        {"seed": 2**63 - 1},
    ],
    ids=str,
)
def test_what_is_just_within_the_bounds_is_accepted(fields: dict[str, Any]) -> None:
    config = validation.parse(raw(fields))
    assert build(Config, to_dict(config)) == config
