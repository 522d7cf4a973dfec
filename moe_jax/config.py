"""Every setting of a run: one frozen dataclass a concern, with its default, its unit and its check.

A config file (`configs/*.py`) starts from `default_config()`, changes fields and returns the
`ConfigDict`. `validation.parse` turns that into a frozen `Config` and refuses what cannot run.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

MESH_AXES = ("data", "fsdp", "expert_outer", "expert", "tensor", "context", "pipeline")
DTYPES = ("float32", "bfloat16")


class UserError(ValueError):
    """A mistake of the user's: a command answers it with its sentence alone and exit code 2."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1, which takes the devices that the others leave."""

    num_cpu_devices: int = 1  # emulated devices over all processes; only read on CPU
    data: int = 1  # the batch, parameters repeated
    fsdp: int = -1  # the batch, parameters and optimizer state split
    expert_outer: int = 1  # experts and the batch, over slow links
    expert: int = 1  # experts and the batch, over fast links
    tensor: int = 1
    context: int = 1
    pipeline: int = 1


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    num_heads: int = 4
    q_lora_rank: int | None = 96  # None: queries are not compressed, as in V2-Lite
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rope_theta: float = 10000.0


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Shared and routed experts (DeepSeek-V3, section 2.1.2)."""

    num_experts: int = 16
    num_experts_per_tok: int = 4
    num_shared_experts: int = 1
    intermediate_size: int = 128  # of one expert
    num_expert_groups: int = 4
    num_limited_groups: int = 2  # groups that a token's experts may come from
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    bias_update_speed: float = 0.001  # gamma, added to or taken from a router bias once an update
    sequence_loss_weight: float = 1e-4  # alpha of the sequence-wise balance loss
    buffer_factor: float = 1.5  # dispatch buffer of one round, in balanced loads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. Names follow DeepSeek's public configuration."""

    vocab_size: int = 264
    hidden_size: int = 128
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1  # how many of the layers, from the first, are dense
    intermediate_size: int = 384  # of a dense layer
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Master parameters, gradients and the loss are float32 whatever stands here."""

    compute_dtype: str = "bfloat16"  # activations and the operands of products
    combine_dtype: str = "float32"  # expert outputs on their way back and in their sum


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, both in updates."""

    peak_lr: float = 2e-3
    final_lr: float = 2e-4
    warmup_steps: int = 50
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = False  # True: norms and router decay as well
    clip_norm: float = 1.0  # of the global gradient
    ema_decay: float = 0.0  # 0: no moving average of the parameters is kept


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the curriculum; it lasts `tokens`, padding counted, or to the end if None."""

    sequence_length: int = 256
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Documents, their packing into rows, and the curriculum of row lengths."""

    source: str = "stdlib"  # "stdlib" or a glob of .jsonl and text files
    text_field: str = "text"  # of a JSONL record
    skip_invalid: bool = False  # True: unusable files and lines are counted, not an error
    holdout_every: int = 32  # every n-th document is held out for evaluation
    num_streams: int = 8  # independent packers; divides the rows of every stage
    packing_bins: int = 32  # rows that one packer fills at a time
    mask_documents: bool = True  # False: attention crosses documents, as in V3's pre-training
    prefetch: int = 2  # batches made ahead
    stages: tuple[Stage, ...] = (Stage(),)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The run's length and its rhythm."""

    num_steps: int = 400
    stop_after_step: int | None = None  # end cleanly there, saved; schedules follow num_steps
    tokens_per_step: int = 8192  # rows times length, padding counted
    micro_batches: int = 1  # gradient accumulation
    # "full": a layer keeps its input alone. "none": all but gathered dense weights.
    rematerialization: str = "full"
    log_every_steps: int = 10
    eval_every_steps: int = 100
    eval_batches: int = 4
    sample_tokens: int = 160  # text generated at the end; 0: none
    sample_prompt: str = "def "


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints are written under WORKDIR/checkpoints."""

    every_steps: int = 100
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A profiler trace, for TensorBoard or Perfetto, under WORKDIR/profile."""

    steps: str = ""  # "10:13" traces steps 10, 11 and 12


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig = ModelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()


def default_config() -> ConfigDict:
    """Every field at its default, as the mutable `ConfigDict` that config files change."""
    return _to_config_dict(Config())


def _to_config_dict(value: Any) -> ConfigDict:
    result = ConfigDict()
    types_of = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            item = _to_config_dict(item)
        elif field.name == "stages":
            item = tuple(dataclasses.asdict(stage) for stage in item)
        elif types.NoneType in typing.get_args(types_of[field.name]):
            # On the command line, "None" is a value of `object` alone; `build` checks the type.
            item = config_dict.FieldReference(item, field_type=object)
        result[field.name] = item
    return result.lock()


def build(cls: type, raw: Any, path: str = "config") -> Any:
    """A dataclass from nested mappings.

    Raises:
      ValueError: a field that does not exist, or a value of the wrong type.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{path} must be a group of fields, not {raw!r}")
    types_of = typing.get_type_hints(cls)
    for name in raw:
        if name not in types_of:
            raise UserError(unknown_field(f"{path}.{name}", list(types_of)))
    values = {}
    for name, kind in types_of.items():
        if name not in raw:
            continue
        value, place = raw[name], f"{path}.{name}"
        if dataclasses.is_dataclass(kind):
            values[name] = build(typing.cast(type, kind), value, place)
        elif typing.get_origin(kind) is tuple:
            if not isinstance(value, tuple | list) or not value:
                raise UserError(f"{place} must be a tuple of stages, not {value!r}")
            item = typing.get_args(kind)[0]
            values[name] = tuple(build(item, v, f"{place}[{i}]") for i, v in enumerate(value))
        else:
            values[name] = _scalar(kind, value, place)
    return cls(**values)


def _scalar(kind: Any, value: Any, place: str) -> Any:
    allowed = typing.get_args(kind) or (kind,)
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
        raise UserError(f"{place} must be of type {names}, not {value!r}")
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{place}={value} must be a finite number")
    return value


def unknown_field(path: str, siblings: list[str]) -> str:
    """The sentence for a field that does not exist."""
    parent, _, name = path.rpartition(".")
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    if not close:
        return f"{path} does not exist; {parent} has {', '.join(siblings)}"
    return f"{path} does not exist; did you mean {parent}.{close[0]}?"


def field_names(path: str) -> list[str]:
    """The fields of the group at `path` ("config.model.moe"); empty if there is no such group."""
    kind: Any = Config
    for name in path.split(".")[1:]:
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return list(typing.get_type_hints(kind)) if dataclasses.is_dataclass(kind) else []


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts and lists, as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
