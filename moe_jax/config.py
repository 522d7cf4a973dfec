"""Every setting of a run: one frozen dataclass a concern, with its default, its unit and its check.

A config file (`configs/*.py`) starts from `default_config()`, changes fields and returns the
`ConfigDict`. `validation.parse` turns that into a frozen `Config` and refuses what cannot run.
"""

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict, config_dict

from moe_jax.fields import UserError as UserError

MESH_AXES = ("data", "fsdp", "expert_outer", "expert", "tensor", "context", "pipeline")
DTYPES = ("float32", "bfloat16")
# Of products with operands of eight bits: `ops/fp8_recipes.py`.
RECIPES = ("none", "fp8_block", "fp8_tensor", "fp8_delayed", "mxfp8")
FP8_PARTS = ("attention", "mlp", "experts", "mtp", "dispatch")


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
    """Latent attention (DeepSeek-V2, section 2.1) or grouped-query attention (Ainslie et al. 2023).

    Each kind reads its own sizes below `num_heads`.
    """

    kind: str = "latent"  # or "grouped_query"
    num_heads: int = 4
    q_lora_rank: int | None = 96  # None: queries are not compressed, as in V2-Lite
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    num_key_value_heads: int = 2  # grouped_query: heads of keys and values
    head_dim: int = 32  # grouped_query: of queries, keys and values


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched beyond the length of pre-training."""

    theta: float = 10000.0
    interleaved: bool = True  # pairs (0, 1), (2, 3), ...; False: (0, n / 2), (1, n / 2 + 1), ...
    scaling: str = "none"  # or "yarn" (Peng et al. 2023), "llama3"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096  # of pre-training
    beta_fast: float = 32.0  # yarn: turns within that length above which nothing is stretched
    beta_slow: float = 1.0  # yarn: turns below which all is
    mscale: float | None = None  # yarn: both are of DeepSeek's form
    mscale_all_dim: float | None = None
    attention_factor: float | None = None  # yarn: on cosine and sine; None: by factor and mscale
    truncate: bool = True  # yarn: whole dims at the two borders
    low_freq_factor: float = 1.0  # llama3: turns below which all is stretched
    high_freq_factor: float = 4.0  # llama3: turns above which nothing is


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a value is, or where it goes, until so many tokens of the run are seen.

    "constant" is `value` all along. "linear" and "cosine" go there from the value at the end of the
    phase before, or from 0: a warm-up is a linear phase at the start. Behind the last phase the
    value stays.
    """

    value: float = 0.0
    until_tokens: int | None = None  # padding counted; None, in the last phase: the run's end
    kind: str = "constant"  # or "linear", "cosine"


# A number, or what it becomes as tokens are seen (`schedules.py`).
Schedule = float | tuple[Phase, ...]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Shared and routed experts, what balances them, and what is dropped.

    A loss is off at weight 0; `ops/balance.py` has their equations. Each is summed over layers.
    """

    num_experts: int = 16
    num_experts_per_tok: int = 4
    num_shared_experts: int = 1
    intermediate_size: int = 128  # of one expert
    scoring_func: str = "sigmoid"  # or "softmax"
    # How experts are chosen: "noaux_tc" with a bias, groups by the sum of their two best (V3);
    # "group_limited_greedy", groups by their best (V2); "greedy", without groups.
    topk_method: str = "noaux_tc"
    num_expert_groups: int = 4
    num_limited_groups: int = 2  # groups that a token's experts may come from
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    bias_update_speed: Schedule = 0.001  # gamma, which a router bias moves by once an update
    sequence_loss_weight: Schedule = 1e-4  # V3's sequence-wise loss
    expert_loss_weight: Schedule = 0.0  # V2's three, per sequence
    device_loss_weight: Schedule = 0.0
    communication_loss_weight: Schedule = 0.0
    num_device_groups: int = 1  # equal parts of the experts, V2's devices
    switch_loss_weight: Schedule = 0.0  # Switch Transformer's, per micro-batch and layer
    mixtral_loss_weight: Schedule = 0.0  # the same of all layers' routing pooled
    z_loss_weight: Schedule = 0.0  # on the router's logits
    # What training drops: "none"; "expert", what exceeds an expert's capacity, later tokens first
    # (Switch); "device", what exceeds a device group's, lowest scores first (V2).
    token_dropping: str = "none"
    capacity_factor: float = 1.25  # capacity in balanced loads
    capacity_group: int | None = 1  # rows whose tokens share a capacity; None: a whole micro-batch
    undropped_sequences: float = 0.1  # "device": share of rows that keep all their tokens
    buffer_factor: float = 1.5  # dispatch buffer of one round, in balanced loads
    # In training, a device's tokens go to their experts and back in so many parts, one after the
    # other: while one travels, experts work on another.
    exchange_parts: int = 1


# Forms of an operation by platform; the first is what "auto" means.
_KERNELS = {"cpu": ("portable",), "tpu": ("tpu", "portable"), "gpu": ("gpu", "portable")}
BACKENDS = {
    "attention": _KERNELS,
    "grouped_matmul": _KERNELS,
    "exchange": {"cpu": ("padded",), "tpu": ("ragged", "padded"), "gpu": ("padded", "ragged")},
}


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    """Which form of an operation is compiled, of `BACKENDS`; "auto": by platform."""

    attention: str = "auto"
    grouped_matmul: str = "auto"  # the experts' products
    exchange: str = "auto"  # tokens to the devices of their experts and back


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
    # Weights start with this standard deviation; for "fan_in" it is the variance times the number
    # of inputs, cut off at two standard deviations (Switch Transformer, section 2.4).
    initializer_range: float = 0.02
    initializer: str = "normal"
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0  # depth of multi-token prediction
    attention: AttentionConfig = AttentionConfig()
    rope: RopeConfig = RopeConfig()
    moe: MoEConfig = MoEConfig()
    backends: BackendConfig = BackendConfig()


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Master parameters, gradients and the loss are float32 whatever stands here."""

    compute_dtype: str = "bfloat16"  # activations and the operands of products
    combine_dtype: str = "float32"  # expert outputs on their way back and in their sum
    # Of products with operands of eight bits: "fp8_block" (DeepSeek-V3), "fp8_tensor",
    # "fp8_delayed", "mxfp8"; for "none" operands are `compute_dtype`.
    recipe: str = "none"
    # What the recipe covers: the projections of attention, dense and shared feed-forward layers,
    # routed experts, the projections of multi-token prediction, tokens on their way to experts.
    fp8_parts: str = "attention,mlp,experts,mtp,dispatch"
    # "native": by units for eight bits; "portable": operands are rounded, and products are wide;
    # "auto": native where the devices can.
    fp8_form: str = "auto"
    # Errors, saturated and flushed shares and scales of operands are logged, by layer.
    fp8_report: bool = False
    # A product one of whose operands has a greater relative error takes them as they are from then
    # on; 0: none does. It needs `fp8_report`.
    fp8_error_bound: float = 0.0

    @property
    def fp8_state(self) -> bool:
        """Whether products remember or report anything."""
        return self.recipe == "fp8_delayed" or (self.recipe != "none" and self.fp8_report)

    def recipe_of(self, part: str) -> str:
        """The recipe of one of `FP8_PARTS`, or "none"."""
        assert part in FP8_PARTS, part
        return self.recipe if part in self.fp8_parts.split(",") else "none"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The learning rate is a linear warm-up and one cosine, or any other phases."""

    peak_lr: float | None = 2e-3  # at the end of the warm-up
    final_lr: float | None = 2e-4  # at the end of the run
    warmup_steps: int | None = 50
    lr_phases: tuple[Phase, ...] | None = None  # in place of those three, which are then None
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = False  # True: norms and router decay as well
    clip_norm: float = 1.0  # of the global gradient
    moments_dtype: str = "float32"  # as they are stored; they are computed in float32
    ema_decay: float = 0.0  # 0: no moving average of the parameters is kept


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: batches of one shape, until so many tokens of the run are seen.

    With a value that it comes from, it is a ramp from there to its own: at most `ramp_shapes`
    stages, of lengths that are multiples of 128 (`curriculum.py`).
    """

    sequence_length: int = 256
    until_tokens: int | None = None  # padding counted; None, in the last stage: the run's end
    tokens_per_step: int | None = None  # None: training's
    # None: as many as keep a micro-batch from growing beyond that of training.
    micro_batches: int | None = None
    mask_documents: bool | None = None  # None: as data has it
    weights: tuple[float, ...] | None = None  # of the sources, summing to 1; None: their own
    rope_factor: float | None = None  # YaRN's, with the other fields of model.rope; None: as there
    learning_rate_factor: float = 1.0
    from_sequence_length: int | None = None
    from_tokens_per_step: int | None = None
    ramp: str = "linear"  # in tokens, or in their root: "sqrt"
    ramp_shapes: int = 8


@dataclasses.dataclass(frozen=True)
class Source:
    """One of several sources of documents.

    path: "stdlib", a glob of files, or a folder of a Hugging Face data set or of tokens.
    weight: share of all tokens; those of all sources sum to 1.
    epochs: the run ends where the source is drawn so often by its weight; None: it repeats.
    """

    path: str = "stdlib"
    weight: float = 1.0
    epochs: float | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Documents, their packing into rows, and the curriculum of row lengths."""

    source: str | tuple[Source, ...] = "stdlib"  # the path of one, or several with their weights
    # "bytes", or a tokenizer.json, a SentencePiece .model, or a folder with one.
    tokenizer: str = "bytes"
    # What a record is: "text", "chats" (messages) or "pairs" (prompt and answer); of the last two,
    # answers alone are trained on.
    records: str = "text"
    text_field: str = "text"
    messages_field: str = "messages"  # objects of role and content
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    message_format: str = "<|im_start|>{role}\n{content}<|im_end|>\n"
    # Fill-in-the-middle: share of the documents, and of those in suffix-prefix-middle; the others
    # are in prefix-suffix-middle.
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    skip_invalid: bool = False  # True: unusable files and records are counted, not an error
    # A glob of JSONL or text files: documents in which n-grams of theirs occur are left out, and
    # counted. For code and maths: "characters:50".
    benchmark: str | None = None
    benchmark_ngrams: str = "words:13"
    benchmark_fields: str = ""  # of a record, "question,answer"; "": every text in it
    # Where tokens are kept of files that are not bytes to be read at random.
    cache: str = "~/.cache/moe_jax/tokens"
    holdout_every: int = 32  # every n-th document is held out for evaluation
    num_streams: int = 8  # independent packers; divides the rows of every stage
    # How documents become rows. "best_fit": each where it leaves least room, cut if longer than a
    # row; "concatenate": one after the other, cut where rows end; "none": a row each, padded.
    packing: str = "best_fit"
    packing_bins: int = 512  # rows that a stream plans and shuffles at a time; 8 bytes a token
    mask_documents: bool = True  # False: attention crosses documents, as in V3's pre-training
    prefetch: int = 2  # batches made ahead
    stages: tuple[Stage, ...] = (Stage(),)

    @property
    def sources(self) -> tuple[Source, ...]:
        return (Source(self.source),) if isinstance(self.source, str) else self.source


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The run's length and its rhythm."""

    init_from: str | None = None  # a checkpoint of ours or a Hugging Face folder to start from
    num_steps: int = 400  # whatever stages say; 0: to the end of the last one
    stop_after_step: int | None = None  # end cleanly there, saved; schedules follow num_steps
    # Multiplies all ends in tokens, num_steps and warmup_steps: to try a recipe.
    recipe_scale: float = 1.0
    tokens_per_step: int = 8192  # rows times length, padding counted
    micro_batches: int = 1  # gradient accumulation, in a step of so many tokens
    # What a layer keeps for its backward pass besides its input. "full": nothing. "latent": MLA's
    # latents and the result of attention. "minimal": routing and received tokens as well. "none":
    # the result of every product.
    rematerialization: str = "full"
    mtp_loss_weight: Schedule = 0.3  # lambda of multi-token prediction (V3, equation 25)
    log_every_steps: int = 10
    eval_every_steps: int = 100
    eval_batches: int = 4
    sample_tokens: int = 160  # text generated at the end; 0: none
    sample_prompt: str = "def "


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints are written under WORKDIR/checkpoints; what none of three rules keeps goes."""

    every_steps: int = 100
    every_minutes: float = 0.0  # of time, after the last one, as well; 0: by steps alone
    keep: int = 2  # the newest
    keep_every_steps: int = 0  # and those of steps that are a multiple of this; 0: none
    keep_best: int = 0  # and those with the least held-out loss, where it was measured
    max_failed_saves: int = 3  # so many in a row end the run


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """Bad steps, whose update was skipped or whose loss is a spike, and steps that do not end."""

    max_bad_steps: int = 10  # in a row: back to the checkpoint before, on with new data; 0: never
    max_rollbacks: int = 3  # one more ends the run
    spike_sigmas: float = 0.0  # a spike is so far above the last good losses' mean; 0: none is
    spike_window: int = 100  # losses
    watchdog_minutes: float = 60.0  # no step, evaluation, save or compilation takes longer; 0: any


@dataclasses.dataclass(frozen=True)
class CollapseConfig:
    """What is warned of, with layer and expert; 0 leaves each out."""

    dead_steps: int = 100  # an expert has had no token for so long
    max_violation: float = 0.0  # the fullest expert's load above the mean, in means, in a step
    min_entropy: float = 0.0  # of a router's mean scores, of the largest entropy
    stop: bool = False  # a warning ends the run


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    """Slow, to look for a fault."""

    determinism_check: int = 0  # every so many steps, one is run twice and compared; 0: never
    nans: bool = False  # a skipped step is searched for the first operation that made a NaN


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
    recovery: RecoveryConfig = RecoveryConfig()
    collapse: CollapseConfig = CollapseConfig()
    debug: DebugConfig = DebugConfig()
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
        elif typing.get_args(types_of[field.name]):
            # Values of several types are of type `object` there; `build` checks them.
            item = config_dict.FieldReference(item, field_type=object)
        result[field.name] = item
    return result.lock()


def field_names(path: str) -> list[str]:
    """The fields of the group at `path` ("config.model.moe"); empty if there is no such group."""
    kind: Any = Config
    for name in path.split(".")[1:]:
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return list(typing.get_type_hints(kind)) if dataclasses.is_dataclass(kind) else []


_BALANCING = (
    *("bias_update_speed", "num_device_groups", "token_dropping", "capacity_factor"),
    *("capacity_group", "undropped_sequences", "buffer_factor", "exchange_parts"),
    *(field.name for field in dataclasses.fields(MoEConfig) if field.name.endswith("_loss_weight")),
)
# Fields of config.model by which training balances and computes: no weight depends on them.
WEIGHTLESS = (
    *(f"moe.{name}" for name in _BALANCING),
    *(f"backends.{field.name}" for field in dataclasses.fields(BackendConfig)),
)
