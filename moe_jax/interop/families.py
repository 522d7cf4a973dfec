"""Hugging Face's config.json and our ModelConfig, both ways.

Two styles of config.json exist: `rope_theta`, `rope_scaling` and `torch_dtype`, and the newer
`rope_parameters` and `dtype`. Both are read; the older one, which more programs know, is written.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax import validation
from moe_jax.config import AttentionConfig, Config, ModelConfig, MoEConfig, RopeConfig, UserError
from moe_jax.schedules import last_value

Json = dict[str, Any]

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "llama": "LlamaForCausalLM",
}
# What must have this value, if it is there at all, in every family.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
}
YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
LLAMA3 = ("low_freq_factor", "high_freq_factor")
WORDS = ("topk_method", "scoring_func", "rope_type", "type")
FLAGS = ("tie_word_embeddings", "rope_interleave", "norm_topk_prob", "truncate")
GROUPS = ("rope_parameters", "rope_scaling")
FRACTIONS = (
    *("rms_norm_eps", "initializer_range", "rope_theta", "factor", "routed_scaling_factor"),
    *("aux_loss_alpha", "router_aux_loss_coef"),
    *(name for name in (*YARN, *LLAMA3) if name not in FLAGS),
)


def from_huggingface(raw: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
      ValueError: a family, a routing or another option that this project does not have, a value of
        the wrong type, or values that contradict each other.
    """
    model = _model(raw)
    try:
        validation.check_model(Config(model=model))
    except UserError as error:
        raise UserError(f"config.json describes no model: {error}") from None
    return model


def _model(raw: Mapping[str, Any]) -> ModelConfig:
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(
            f"config.json has model_type {family!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    for name, value in FIXED.items():
        # Some files have 0 or null for "off".
        if (raw.get(name, value) or None) != (value or None):
            raise UserError(f"config.json has {name}={raw[name]!r}; supported is {value!r}")
    read = _Reader(raw)
    layers = read("num_hidden_layers")
    is_latent = family.startswith("deepseek")
    dense = layers if family == "llama" else 0
    if is_latent:
        dense = min(read("first_k_dense_replace"), layers)
        moe = _deepseek_moe(read, family)
    elif family == "mixtral":
        moe = _mixtral_moe(read)
    else:
        moe = MoEConfig()
    return ModelConfig(
        vocab_size=read("vocab_size"),
        hidden_size=read("hidden_size"),
        num_hidden_layers=layers,
        first_k_dense_replace=dense,
        intermediate_size=read("intermediate_size"),
        max_position_embeddings=read("max_position_embeddings"),
        rms_norm_eps=float(read("rms_norm_eps")),
        initializer_range=float(read("initializer_range", 0.02)),
        tie_word_embeddings=read("tie_word_embeddings", False),
        num_nextn_predict_layers=read("num_nextn_predict_layers", read("num_mtp_layers", 0)),
        attention=_latent(read) if is_latent else _grouped_query(read),
        rope=_rope(read, interleaved=is_latent and bool(read("rope_interleave", True))),
        moe=moe,
    )


class _Reader:
    """Fields of a config.json; one of the wrong type, or missing without a default, is an error."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        kinds = {FRACTIONS: (int, float), WORDS: (str,), FLAGS: (bool,), GROUPS: (dict,)}
        self._kinds = {name: kind for names, kind in kinds.items() for name in names}

    def __call__(self, name: str, *default: Any) -> Any:
        value = self.raw.get(name)
        if value is not None:
            if type(value) not in self._kinds.get(name, (int,)):
                raise UserError(f"config.json has {name}={value!r}, which is of the wrong type")
            return value
        if not default:
            raise UserError(f"config.json of model_type {self.raw['model_type']!r} has no {name}")
        return default[0]


def _latent(read: _Reader) -> AttentionConfig:
    return AttentionConfig(
        kind="latent",
        num_heads=read("num_attention_heads"),
        q_lora_rank=read("q_lora_rank", None),
        kv_lora_rank=read("kv_lora_rank"),
        qk_nope_head_dim=read("qk_nope_head_dim"),
        qk_rope_head_dim=read("qk_rope_head_dim"),
        v_head_dim=read("v_head_dim"),
    )


def _grouped_query(read: _Reader) -> AttentionConfig:
    heads = read("num_attention_heads")
    return AttentionConfig(
        kind="grouped_query",
        num_heads=heads,
        num_key_value_heads=read("num_key_value_heads", heads),
        head_dim=read("head_dim", read("hidden_size") // max(heads, 1)),
    )


def _rope(read: _Reader, interleaved: bool) -> RopeConfig:
    group = read("rope_parameters", None) or read("rope_scaling", None) or {}
    scaling = _Reader({**group, "model_type": read.raw["model_type"]})
    theta = float(scaling("rope_theta", None) or read("rope_theta"))
    kind = scaling("rope_type", None) or scaling("type", "default")
    if kind == "default":
        return RopeConfig(theta=theta, interleaved=interleaved)
    names = {"yarn": YARN, "llama3": LLAMA3}.get(kind)
    if names is None:
        raise UserError(
            f"config.json has rotary scaling {kind!r}; supported are default, yarn and llama3"
        )
    longest = read("max_position_embeddings")
    original = scaling("original_max_position_embeddings", longest)
    factor = scaling("factor", None) or longest / max(original, 1)
    given = {name: scaling(name) for name in names if group.get(name) is not None}
    values: Json = {name: x if isinstance(x, bool) else float(x) for name, x in given.items()}
    return RopeConfig(
        theta=theta,
        interleaved=interleaved,
        scaling=kind,
        factor=float(factor),
        original_max_position_embeddings=original,
        **values,
    )


def _deepseek_moe(read: _Reader, family: str) -> MoEConfig:
    is_v3 = family == "deepseek_v3"
    method = read("topk_method", "noaux_tc" if is_v3 else "greedy")
    scoring = read("scoring_func", "sigmoid" if is_v3 else "softmax")
    supported = {
        "deepseek_v3": (("noaux_tc",), ("sigmoid",)),
        "deepseek_v2": (("greedy", "group_limited_greedy"), ("softmax",)),
    }[family]
    for name, value, options in (
        ("topk_method", method, supported[0]),
        ("scoring_func", scoring, supported[1]),
    ):
        if value not in options:
            raise UserError(
                f"config.json has {name} {value!r}; supported for model_type {family!r} are "
                f"{', '.join(options)}"
            )
    has_groups = method != "greedy"
    groups = read("n_group", 1) if has_groups else 1
    normalized = bool(read("norm_topk_prob", is_v3))
    scale = float(read("routed_scaling_factor"))
    if family == "deepseek_v2" and normalized:
        scale = 1.0  # DeepSeek's own code normalises instead of scaling
    alpha = float(read("aux_loss_alpha", 0.0001 if is_v3 else 0.001))
    return MoEConfig(
        num_experts=read("n_routed_experts"),
        num_experts_per_tok=read("num_experts_per_tok"),
        # Null stands for none; a file without the field is of another kind.
        num_shared_experts=read.raw["n_shared_experts"] or 0
        if "n_shared_experts" in read.raw
        else read("n_shared_experts"),
        intermediate_size=read("moe_intermediate_size"),
        scoring_func=scoring,
        topk_method=method,
        num_expert_groups=groups,
        num_limited_groups=read("topk_group", groups) if has_groups else 1,
        norm_topk_prob=normalized,
        routed_scaling_factor=scale,
        sequence_loss_weight=alpha if is_v3 else 0.0,
        expert_loss_weight=0.0 if is_v3 else alpha,
    )


def _mixtral_moe(read: _Reader) -> MoEConfig:
    return MoEConfig(
        num_experts=read("num_local_experts"),
        num_experts_per_tok=read("num_experts_per_tok"),
        num_shared_experts=0,
        intermediate_size=read("intermediate_size"),
        scoring_func="softmax",
        topk_method="greedy",
        num_expert_groups=1,
        num_limited_groups=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        sequence_loss_weight=0.0,
        mixtral_loss_weight=float(read("router_aux_loss_coef", 0.001)),
    )


def to_huggingface(config: ModelConfig, dtype: str) -> Json:
    """The config.json of a model whose tensors are `dtype`.

    Raises:
      ValueError: no family of Hugging Face's has these options.
    """
    family = _family(config)
    attention, moe = config.attention, config.moe
    raw: Json = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_attention_heads": attention.num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "torch_dtype": dtype,
        # Ids of the end and the beginning belong to a tokenizer.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.initializer == "normal":
        raw["initializer_range"] = config.initializer_range
    if attention.kind == "grouped_query":
        raw |= {"num_key_value_heads": attention.num_key_value_heads}
        raw |= {"head_dim": attention.head_dim}
    if family == "mixtral":
        raw |= {
            "intermediate_size": moe.intermediate_size,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "router_aux_loss_coef": last_value(moe.mixtral_loss_weight),
            "sliding_window": None,
        }
    if attention.kind == "latent":
        raw |= {
            "num_key_value_heads": attention.num_heads,
            "q_lora_rank": attention.q_lora_rank,
            "kv_lora_rank": attention.kv_lora_rank,
            "qk_nope_head_dim": attention.qk_nope_head_dim,
            "qk_rope_head_dim": attention.qk_rope_head_dim,
            "v_head_dim": attention.v_head_dim,
            "first_k_dense_replace": config.first_k_dense_replace,
            "moe_layer_freq": 1,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.num_shared_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "moe_intermediate_size": moe.intermediate_size,
            "scoring_func": moe.scoring_func,
            "topk_method": moe.topk_method,
            "n_group": moe.num_expert_groups,
            "topk_group": moe.num_limited_groups,
            "norm_topk_prob": moe.norm_topk_prob,
            "routed_scaling_factor": moe.routed_scaling_factor,
        }
        if family == "deepseek_v3":
            raw["rope_interleave"] = config.rope.interleaved
            raw["num_nextn_predict_layers"] = config.num_nextn_predict_layers
            raw["aux_loss_alpha"] = last_value(moe.sequence_loss_weight)
        else:
            raw["aux_loss_alpha"] = last_value(moe.expert_loss_weight)
    return raw


def _family(config: ModelConfig) -> str:
    attention, moe, rope = config.attention, config.moe, config.rope
    is_latent = attention.kind == "latent"
    is_dense = config.first_k_dense_replace == config.num_hidden_layers
    if is_latent:
        family = "deepseek_v3" if moe.topk_method == "noaux_tc" or is_dense else "deepseek_v2"
    else:
        family = "llama" if is_dense else "mixtral"
    needed: dict[str, tuple[Any, Any]] = {}
    if family != "deepseek_v3":
        needed["num_nextn_predict_layers"] = (config.num_nextn_predict_layers, 0)
        needed["rope.interleaved"] = (rope.interleaved, is_latent)
    if family == "deepseek_v3" and not is_dense:
        needed["moe.scoring_func"] = (moe.scoring_func, "sigmoid")
    if family == "deepseek_v2":
        needed["moe.scoring_func"] = (moe.scoring_func, "softmax")
        if moe.norm_topk_prob:
            needed["moe.routed_scaling_factor"] = (moe.routed_scaling_factor, 1.0)
    if family == "mixtral":
        needed |= {
            "first_k_dense_replace": (config.first_k_dense_replace, 0),
            "moe.scoring_func": (moe.scoring_func, "softmax"),
            "moe.topk_method": (moe.topk_method, "greedy"),
            "moe.norm_topk_prob": (moe.norm_topk_prob, True),
            "moe.routed_scaling_factor": (moe.routed_scaling_factor, 1.0),
            "moe.num_shared_experts": (moe.num_shared_experts, 0),
        }
    wrong = [
        f"config.model.{name}={value!r} must be {wanted!r}"
        for name, (value, wanted) in needed.items()
        if value != wanted
    ]
    if wrong:
        raise UserError(f"to be written as model_type {family!r}, {' and '.join(wrong)}")
    return family


def _rope_scaling(rope: RopeConfig) -> Json | None:
    if rope.scaling == "none":
        return None
    names = YARN if rope.scaling == "yarn" else LLAMA3
    given = {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    return {
        "type": rope.scaling,
        "rope_type": rope.scaling,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        **given,
    }
