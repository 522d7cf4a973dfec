"""Every check of a config: what cannot run is refused in one sentence, before JAX is touched."""

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moe_jax import curriculum, schedules
from moe_jax.config import (
    BACKENDS,
    DTYPES,
    FP8_PARTS,
    MESH_AXES,
    RECIPES,
    Config,
    DataConfig,
    UserError,
    field_names,
)
from moe_jax.fields import build


def parse(raw: ConfigDict | Mapping[str, Any]) -> Config:
    """The frozen form of a config file's result, checked.

    Raises:
      ValueError: a field that does not exist, a value of the wrong type, or a combination that
        cannot run; the sentence names the fields and their values.
    """
    if isinstance(raw, ConfigDict):
        raw = raw.to_dict()
    config = build(Config, raw)
    _check_given(config)
    config = curriculum.resolved(config)
    _check(config)
    return config


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise UserError(sentence)


def _divides(config: Config, small: str, large: str, why: str) -> None:
    """Requires that the field `small` divides the field `large`."""
    a, b = _value(config, small), _value(config, large)
    _require(b % a == 0, f"config.{large}={b} must be a multiple of config.{small}={a}: {why}")


def _at_least(config: Config, bound: float, *fields: str) -> None:
    for field in fields:
        value = _value(config, field)
        if value is not None:
            _require(value >= bound, f"config.{field}={value} must be at least {bound}")


def _at_most(config: Config, small: str, large: str) -> None:
    a, b = _value(config, small), _value(config, large)
    _require(a <= b, f"config.{small}={a} must not exceed config.{large}={b}")


def _value(config: Config, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        name, _, index = name.rstrip("]").partition("[")
        value = getattr(value, name)[int(index)] if index else getattr(value, name)
    return value


def _check_given(config: Config) -> None:
    """What the curriculum is made of."""
    _at_least(config, 1, "training.tokens_per_step", "training.micro_batches")
    _at_least(config, 0, "training.num_steps")
    scale = config.training.recipe_scale
    _require(
        0 < scale <= 1,
        f"config.training.recipe_scale={scale} must be above 0 and at most 1, the whole recipe",
    )
    curriculum.check_given(config)
    _check_learning_rate(config)
    for field in schedules.FIELDS:
        _check_schedule(config, field)


def _check(config: Config) -> None:
    """What can be known without devices; `check_mesh` has the rest."""
    _check_mesh_fields(config)
    check_model(config)
    _check_data(config)
    _check_run(config)


def _check_mesh_fields(config: Config) -> None:
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        _require(
            size >= 1 or size == -1,
            f"config.mesh.{axis}={size} must be at least 1, or -1 for the devices that are left",
        )
    free = [f"config.mesh.{axis}" for axis, size in sizes.items() if size == -1]
    _require(len(free) <= 1, f"only one mesh axis may be -1, but {' and '.join(free)} are")
    for axis in ("tensor", "context", "pipeline"):
        _require(
            sizes[axis] == 1,
            f"config.mesh.{axis}={sizes[axis]} is not implemented yet and must be 1; use data, "
            "fsdp, expert_outer and expert",
        )
    _at_least(config, 1, "mesh.num_cpu_devices")


def _one_of(config: Config, field: str, *options: str) -> None:
    value = _value(config, field)
    _require(value in options, f"config.{field}={value!r} must be one of {', '.join(options)}")


def check_model(config: Config) -> None:
    """The checks of `config.model` and `config.precision`.

    Raises:
      ValueError: see `parse`.
    """
    _at_least(
        config,
        1,
        *("model.vocab_size", "model.hidden_size", "model.num_hidden_layers"),
        *("model.intermediate_size", "model.max_position_embeddings"),
    )
    _at_least(
        config,
        0,
        *("model.first_k_dense_replace", "model.rms_norm_eps", "model.initializer_range"),
        "model.num_nextn_predict_layers",
    )
    _at_most(config, "model.first_k_dense_replace", "model.num_hidden_layers")
    _one_of(config, "model.initializer", "normal", "fan_in")
    _check_attention(config)
    _check_moe(config)
    for operation, forms in BACKENDS.items():
        known = dict.fromkeys(form for of_platform in forms.values() for form in of_platform)
        _one_of(config, f"model.backends.{operation}", "auto", *known)
    _one_of(config, "optimizer.moments_dtype", *DTYPES)
    _one_of(config, "precision.compute_dtype", *DTYPES)
    _one_of(config, "precision.combine_dtype", *DTYPES)
    _one_of(config, "precision.recipe", *RECIPES)
    _one_of(config, "precision.fp8_form", "auto", "native", "portable")
    _at_least(config, 0, "precision.fp8_error_bound")
    _require(
        not config.precision.fp8_error_bound or config.precision.fp8_report,
        f"config.precision.fp8_error_bound={config.precision.fp8_error_bound} needs "
        "config.precision.fp8_report=True, which measures errors",
    )
    parts = config.precision.fp8_parts
    for part in parts.split(",") if parts else ():
        if part not in FP8_PARTS:
            raise UserError(
                f"config.precision.fp8_parts={parts!r} has {part!r}, which is none of "
                f"{', '.join(FP8_PARTS)}"
            )


def _check_attention(config: Config) -> None:
    _one_of(config, "model.attention.kind", "latent", "grouped_query")
    sizes = [n for n in field_names("config.model.attention") if n != "kind"]
    _at_least(config, 1, *(f"model.attention.{n}" for n in sizes))
    if config.model.attention.kind == "latent":
        rotary = "model.attention.qk_rope_head_dim"
    else:
        rotary = "model.attention.head_dim"
        _divides(
            config,
            "model.attention.num_key_value_heads",
            "model.attention.num_heads",
            "as many query heads share each of them",
        )
    dim = _value(config, rotary)
    _require(dim % 2 == 0, f"config.{rotary}={dim} must be even: rotary dims go in pairs")

    rope = config.model.rope
    _one_of(config, "model.rope.scaling", "none", "yarn", "llama3")
    _at_least(config, 1, "model.rope.factor", "model.rope.original_max_position_embeddings")
    _require(rope.theta > 1, f"config.model.rope.theta={rope.theta} must be above 1")
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        a, b = getattr(rope, low), getattr(rope, high)
        _require(
            0 < a < b,
            f"config.model.rope.{low}={a} must be above 0 and below config.model.rope.{high}={b}",
        )


def _check_moe(config: Config) -> None:
    moe = config.model.moe
    _at_least(
        config,
        1,
        *("model.moe.num_experts", "model.moe.num_experts_per_tok", "model.moe.intermediate_size"),
        *("model.moe.num_expert_groups", "model.moe.num_limited_groups", "model.moe.buffer_factor"),
        *("model.moe.num_device_groups", "model.moe.capacity_group", "model.moe.exchange_parts"),
    )
    _at_least(
        config,
        0,
        *("model.moe.num_shared_experts", "model.moe.routed_scaling_factor"),
    )
    _one_of(config, "model.moe.scoring_func", "sigmoid", "softmax")
    _one_of(config, "model.moe.topk_method", "noaux_tc", "group_limited_greedy", "greedy")
    _one_of(config, "model.moe.token_dropping", "none", "expert", "device")
    _at_most(config, "model.moe.num_experts_per_tok", "model.moe.num_experts")
    _divides(config, "model.moe.num_expert_groups", "model.moe.num_experts", "groups are equal")
    _divides(config, "model.moe.num_device_groups", "model.moe.num_experts", "groups are equal")
    _at_most(config, "model.moe.num_limited_groups", "model.moe.num_expert_groups")
    groups = f"config.model.moe.num_expert_groups={moe.num_expert_groups}"
    _require(
        moe.topk_method != "greedy" or moe.num_limited_groups == moe.num_expert_groups,
        f"config.model.moe.topk_method='greedy' knows no groups, so config.model.moe."
        f"num_limited_groups={moe.num_limited_groups} must be {groups}",
    )
    _require(
        not moe.communication_loss_weight or moe.num_device_groups == moe.num_expert_groups,
        f"config.model.moe.num_device_groups={moe.num_device_groups} must be {groups} for the "
        "communication loss, which counts the groups that a token is sent to",
    )
    reachable = moe.num_limited_groups * moe.num_experts // moe.num_expert_groups
    _require(
        moe.num_experts_per_tok <= reachable,
        f"config.model.moe.num_experts_per_tok={moe.num_experts_per_tok} exceeds the {reachable} "
        f"experts of config.model.moe.num_limited_groups={moe.num_limited_groups} groups",
    )
    capacity, share = moe.capacity_factor, moe.undropped_sequences
    _require(capacity > 0, f"config.model.moe.capacity_factor={capacity} must be above 0")
    _require(
        0 <= share <= 1, f"config.model.moe.undropped_sequences={share} must be between 0 and 1"
    )


def _check_data(config: Config) -> None:
    _at_least(config, 1, "data.num_streams", "data.packing_bins")
    _one_of(config, "data.packing", "best_fit", "concatenate", "none")
    _at_least(config, 0, "data.holdout_every", "data.prefetch")
    _check_sources(config.data)
    _one_of(config, "data.records", "text", "chats", "pairs")
    check_records(config.data)
    _require(
        re.fullmatch(r"(words|characters):[1-9]\d*", config.data.benchmark_ngrams) is not None,
        f"config.data.benchmark_ngrams={config.data.benchmark_ngrams!r} must be words:13, "
        "characters:50 or the like",
    )
    for name in ("fim_rate", "fim_spm_rate"):
        rate = getattr(config.data, name)
        _require(0 <= rate <= 1, f"config.data.{name}={rate} must be between 0 and 1")
    _require(
        not config.data.fim_rate or config.data.records == "text",
        f"config.data.fim_rate={config.data.fim_rate} must be 0 for config.data.records="
        f"{config.data.records!r}, whose answers come last",
    )
    _require(
        config.data.holdout_every != 1,
        "config.data.holdout_every=1 would hold out every document; 0 holds out none",
    )
    curriculum.check(config)


def _check_sources(data: DataConfig) -> None:
    for i, source in enumerate(data.sources):
        field = "source" if isinstance(data.source, str) else f"source[{i}].path"
        _require(
            source.path != "",
            f"config.data.{field}='' is empty; give 'stdlib', a glob of files or a folder",
        )
        for name in ("weight", "epochs"):
            value = getattr(source, name)
            _require(
                value is None or value > 0,
                f"config.data.source[{i}].{name}={value} must be above 0",
            )
    weights = [source.weight for source in data.sources]
    curriculum.check_weights("the weights of config.data.source", weights, len(weights))


def check_records(data: DataConfig) -> None:
    """Raises:
    ValueError: records cannot be put into the form that is wanted.
    """
    _require(
        data.message_format.count("{content}") == 1,
        f"config.data.message_format={data.message_format!r} must have {{content}} once",
    )


def _check_run(config: Config) -> None:
    _at_least(config, 1, "training.stop_after_step")
    _at_least(config, 1, "training.log_every_steps", "training.eval_every_steps")
    _at_least(config, 0, "training.eval_batches", "training.sample_tokens")
    _at_least(config, 1, *(f"checkpoint.{n}" for n in ("every_steps", "keep", "max_failed_saves")))
    _at_least(config, 0, "checkpoint.every_minutes")
    _at_least(config, 0, "checkpoint.keep_every_steps", "checkpoint.keep_best")
    _at_least(config, 1, "recovery.spike_window")
    _at_least(config, 0, *(f"recovery.{n}" for n in ("max_bad_steps", "max_rollbacks")))
    _at_least(config, 0, "recovery.spike_sigmas", "recovery.watchdog_minutes")
    _at_least(config, 0, "collapse.dead_steps", "collapse.max_violation", "collapse.min_entropy")
    _at_least(config, 0, "debug.determinism_check")
    _at_least(config, 0, "seed")
    _require(config.seed < 2**63, f"config.seed={config.seed} must be below 2**63")
    if config.training.stop_after_step is not None:
        _at_most(config, "training.stop_after_step", "training.num_steps")
    _one_of(config, "training.rematerialization", "none", "minimal", "latent", "full")
    _at_least(config, 0, "optimizer.weight_decay")
    for name in ("clip_norm", "eps"):
        value = getattr(config.optimizer, name)
        _require(value > 0, f"config.optimizer.{name}={value} must be above 0")
    for name in ("b1", "b2", "ema_decay"):
        value = getattr(config.optimizer, name)
        _require(0 <= value < 1, f"config.optimizer.{name}={value} must be in [0, 1)")
    _check_sample(config)
    profile_steps(config)


def _check_learning_rate(config: Config) -> None:
    fields = ("optimizer.peak_lr", "optimizer.final_lr", "optimizer.warmup_steps")
    if config.optimizer.lr_phases is not None:
        for field in fields:
            _require(
                _value(config, field) is None,
                f"config.{field}={_value(config, field)} must be None: config.optimizer.lr_phases "
                "stands in its place",
            )
        _check_schedule(config, "optimizer.lr_phases")
        return
    for field in fields:
        _require(
            _value(config, field) is not None,
            f"config.{field}=None must be a number where config.optimizer.lr_phases is None",
        )
    _at_least(config, 0, *fields)
    _at_most(config, "optimizer.final_lr", "optimizer.peak_lr")


def _check_schedule(config: Config, field: str) -> None:
    """A number, or phases one after the other."""
    schedule = _value(config, field)
    if not isinstance(schedule, tuple):
        _at_least(config, 0, field)
        return
    ends = [phase.until_tokens for phase in schedule]
    for i in range(len(schedule)):
        _at_least(config, 0, f"{field}[{i}].value")
        _one_of(config, f"{field}[{i}].kind", *schedules.KINDS)
    curriculum.check_ends(f"config.{field}", ends)


def _check_sample(config: Config) -> None:
    added, limit = config.training.sample_tokens, config.model.max_position_embeddings
    prompt = 1 + len(config.training.sample_prompt.encode())  # a boundary stands before it
    _require(
        not added or prompt + added <= limit,
        f"config.training.sample_tokens={added} after the {prompt} tokens of "
        f"config.training.sample_prompt exceeds config.model.max_position_embeddings={limit}",
    )


def profile_steps(config: Config) -> range:
    """The steps of `config.profile.steps`; none if it is empty."""
    text = config.profile.steps
    if not text:
        return range(0)
    first, colon, last = text.partition(":")
    valid = bool(colon) and first.isdecimal() and last.isdecimal() and 0 < int(first) < int(last)
    _require(
        valid, f"config.profile.steps={text!r} must be two steps with a colon between, as in 10:13"
    )
    return range(int(first), int(last))


def check_mesh(config: Config, sizes: Mapping[str, int], platform: str = "cpu") -> None:
    """What needs the sizes of the mesh axes and the platform of the devices.

    Raises:
      ValueError: experts or rows do not divide over the mesh, or the platform lacks a back end.
    """
    for operation, forms in BACKENDS.items():
        wanted, runs = _value(config, f"model.backends.{operation}"), ("auto", *forms[platform])
        _require(
            wanted in runs,
            f"config.model.backends.{operation}={wanted!r} does not run on {platform}; set it to "
            f"{' or '.join(runs)}",
        )
    experts, shards = config.model.moe.num_experts, sizes["expert_outer"] * sizes["expert"]
    model = config.model
    _require(
        model.first_k_dense_replace == model.num_hidden_layers or experts % shards == 0,
        f"config.model.moe.num_experts={experts} must be a multiple of the {shards} devices of "
        f"config.mesh.expert_outer={sizes['expert_outer']} times config.mesh.expert="
        f"{sizes['expert']}",
    )
    batch = sizes["data"] * sizes["fsdp"] * shards
    for i, stage in enumerate(config.data.stages):
        tokens = curriculum.tokens_per_step(config, stage)
        parts = curriculum.micro_batches(config, stage)
        micro = tokens // stage.sequence_length // parts
        _require(
            micro % batch == 0,
            f"the {micro} rows of a micro-batch in config.data.stages[{i}] "
            f"({tokens} tokens a step / sequence_length={stage.sequence_length} / {parts} "
            f"micro-batches) must be a multiple of the {batch} devices that the batch is split "
            "over (data * fsdp * expert_outer * expert)",
        )
        tokens, parts = micro // batch * stage.sequence_length, config.model.moe.exchange_parts
        _require(
            tokens % parts == 0,
            f"config.model.moe.exchange_parts={parts} must divide the {tokens} tokens that each "
            f"device has of a micro-batch in config.data.stages[{i}]",
        )
