"""A family's config at the size of a laptop."""

from typing import Any

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.fields import UserError

# Of a run at that size.
DEVICES, LENGTH, TOKENS, STEPS = 8, 256, 4096, 160  # tokens of a step
PEAK = 4e-3  # of the learning rate


def sized(config: ConfigDict, size: str) -> ConfigDict:
    """A family's config as it is ("full"), or its options with small sizes ("tiny").

    A config file gives what follows the colon in --config=configs/NAME.py:tiny. Tiny models have
    the sizes of `default_config()` and train on 8 emulated devices.

    Raises:
      ValueError: another word than these two.
    """
    if size == "full":
        return config
    if size != "tiny":
        raise UserError(f"the config knows no size {size!r}; full and tiny are there")
    family: Any = config  # what its fields hold, no type says
    small: Any = default_config()
    model = family.model
    routed = model.first_k_dense_replace < model.num_hidden_layers
    model.first_k_dense_replace = min(model.first_k_dense_replace, 1) if routed else 4
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
        model[name] = small.model[name]
    model.max_position_embeddings = small.model.max_position_embeddings
    if model.initializer == "normal":
        model.initializer_range = small.model.initializer_range
    if model.rope.scaling != "none":
        model.rope.original_max_position_embeddings = 128
    attention = small.model.attention
    if model.attention.q_lora_rank is None:
        attention.q_lora_rank = None
    with model.unlocked():
        attention.kind, model.attention = model.attention.kind, attention
    moe = model.moe
    moe.num_experts = min(moe.num_experts, 16)
    moe.num_experts_per_tok = min(moe.num_experts_per_tok, 4)
    moe.num_expert_groups = min(moe.num_expert_groups, 4)
    moe.num_limited_groups = min(moe.num_limited_groups, 2, moe.num_expert_groups)
    moe.num_device_groups = min(moe.num_device_groups, 4)
    moe.capacity_group = moe.capacity_group and 1
    moe.intermediate_size = 64
    moe.buffer_factor = 2.0
    moe.exchange_parts = 1

    family.mesh = small.mesh
    family.mesh.num_cpu_devices = DEVICES
    family.mesh.fsdp = 2 if routed else 8
    family.mesh.expert = 4 if routed else 1
    data, training = family.data, family.training
    data.num_streams = small.data.num_streams
    _shorten(family)
    training.tokens_per_step = TOKENS
    training.micro_batches = 1
    training.eval_every_steps = family.checkpoint.every_steps = 40
    return config


def _shorten(family: Any) -> None:
    """The recipe in as many steps of small batches, its phases and stages in proportion."""
    data, training, optimizer = family.data, family.training, family.optimizer
    if optimizer.lr_phases is None:
        optimizer.peak_lr, optimizer.final_lr, optimizer.warmup_steps = PEAK, PEAK / 20, 20
    else:
        highest = max(phase["value"] for phase in optimizer.lr_phases)
        optimizer.lr_phases = tuple(
            {**phase, "value": phase["value"] * PEAK / highest} for phase in optimizer.lr_phases
        )
    if training.num_steps:
        data.stages, training.num_steps = ({"sequence_length": LENGTH},), STEPS
        return
    full = training.tokens_per_step
    training.recipe_scale = STEPS * TOKENS / data.stages[-1]["until_tokens"]

    def fewer(tokens: int) -> int:
        rows = round(tokens * TOKENS / full / LENGTH / DEVICES) * DEVICES
        return max(rows, DEVICES) * LENGTH

    data.stages = tuple(
        {
            **stage,
            "sequence_length": LENGTH,
            **{name: fewer(stage[name]) for name in stage if name.endswith("tokens_per_step")},
        }
        for stage in data.stages
    )
