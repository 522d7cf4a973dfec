"""Tiny models of every family in the public checkpoint format: configs, weights and tokens.

Weights follow from a seed and a tensor's name, so that no file needs to hold them. Nothing here
needs torch or JAX.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

BATCH, LENGTH = 4, 20

# No two sizes that could be mixed up are equal; epsilons are large enough to be seen (DeepSeek's
# norms on latents keep their own 1e-6); YaRN's ramp has inner points, and rows are longer than the
# original length.
_COMMON = {
    "vocab_size": 40,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
_LATENT = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "intermediate_size": 48,
}
_V3 = {
    **_COMMON,
    **_LATENT,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 14,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "rope_theta": 100.0,
    "rope_scaling": None,
}
_V2 = {
    **_COMMON,
    **_LATENT,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 14,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}
_LLAMA = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
    "mlp_bias": False,
}
_YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _V3,
    "deepseek_v3_uncompressed": {
        **_V3,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "n_shared_experts": 1,
        "norm_topk_prob": False,
    },
    "deepseek_v3_yarn": {
        **_V3,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "rope_theta": 20.0,
        "rope_scaling": {**_YARN, "type": "yarn", "mscale": 2.0, "mscale_all_dim": 5.0},
    },
    # Blocks of 128 x 128: several, with a narrower last one, and single ones that are not full.
    "deepseek_v3_fp8": {
        **_V3,
        "hidden_size": 160,
        "intermediate_size": 264,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
    "deepseek_v2_greedy": {
        **_V2,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {**_YARN, "rope_type": "yarn", "rope_theta": 20.0},
    },
    "deepseek_v2_group_limited": {
        **_V2,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
        "rope_theta": 20.0,
        "rope_scaling": {**_YARN, "type": "yarn", "mscale": 3.0, "mscale_all_dim": 3.0},
    },
    "mixtral": {
        **_COMMON,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 28,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.5,
        "sliding_window": None,
        "rope_theta": 100.0,
    },
    "llama": {
        **_LLAMA,
        "head_dim": 10,  # 60 over all heads: not the hidden size
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "llama_tied": {
        **_LLAMA,
        "hidden_size": 48,
        "tie_word_embeddings": True,
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_yarn": {
        **_LLAMA,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "rope_parameters": {
            **_YARN,
            "rope_type": "yarn",
            "rope_theta": 20.0,
            "attention_factor": 1.3,
            "truncate": False,
        },
    },
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Public tensor names, one tensor per expert, with their shapes."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    result = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (vocab, width)
    attention = _latent_attention if "kv_lora_rank" in config else _grouped_query_attention
    for layer in range(config["num_hidden_layers"]):
        block = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
        block |= attention(config) | _feed_forward(config, layer)
        result |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return result


def _latent_attention(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, heads, latent = (
        config[k] for k in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    nope, rope, v = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rank = config["q_lora_rank"]
    if rank is None:
        query = {"q_proj": (heads * (nope + rope), width)}
    else:
        query = {
            "q_a_proj": (rank, width),
            "q_a_layernorm": (rank,),
            "q_b_proj": (heads * (nope + rope), rank),
        }
    rest = {
        "kv_a_proj_with_mqa": (latent + rope, width),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (nope + v), latent),
        "o_proj": (width, heads * v),
    }
    return {f"self_attn.{name}.weight": shape for name, shape in (query | rest).items()}


def _grouped_query_attention(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    dim = config.get("head_dim", width // heads)
    keys = config["num_key_value_heads"] * dim
    return {
        "self_attn.q_proj.weight": (heads * dim, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, heads * dim),
    }


def _feed_forward(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    width, hidden = config["hidden_size"], config["intermediate_size"]

    def mlp(prefix: str, hidden: int, gate: str, up: str, down: str) -> dict[str, tuple[int, ...]]:
        wide, narrow = (hidden, width), (width, hidden)
        shapes = {gate: wide, up: wide, down: narrow}
        return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}

    projections = ("gate_proj", "up_proj", "down_proj")
    if "num_local_experts" in config:
        prefix, experts, names = "block_sparse_moe", config["num_local_experts"], ("w1", "w3", "w2")
    elif layer >= config.get("first_k_dense_replace", layer + 1):
        prefix, experts, names = "mlp", config["n_routed_experts"], projections
        hidden = config["moe_intermediate_size"]
    else:
        return mlp("mlp", hidden, *projections)
    result: dict[str, tuple[int, ...]] = {f"{prefix}.gate.weight": (experts, width)}
    if config.get("topk_method") == "noaux_tc":
        result[f"{prefix}.gate.e_score_correction_bias"] = (experts,)
    for expert in range(experts):
        result |= mlp(f"{prefix}.experts.{expert}", hidden, *names)
    if "n_shared_experts" in config:
        result |= mlp("mlp.shared_experts", hidden * config["n_shared_experts"], *projections)
    return result


def is_parameter(name: str) -> bool:
    """False for router biases, which have no gradient."""
    return not name.endswith("e_score_correction_bias")


def weights(config: dict[str, Any], seed: int) -> Tensors:
    """Every tensor in float32, as a model computes with it."""
    result = {}
    for name, shape in shapes(config).items():
        if _is_quantized(config, name):
            codes, scales = _codes(name, shape, seed), _scales(name, shape, seed)
            spread = scales.repeat(128, axis=0).repeat(128, axis=1)[: shape[0], : shape[1]]
            # Exact in float64, and so rounded once.
            result[name] = (_decoded(codes) * spread).astype(np.float32)
        else:
            result[name] = _weight(config, name, shape, seed)
    return result


def stored(config: dict[str, Any], seed: int) -> tuple[Tensors, Tensors]:
    """The same as a checkpoint holds it: tensors, and apart from them codes of e4m3 as uint8."""
    plain, codes = {}, {}
    for name, shape in shapes(config).items():
        if _is_quantized(config, name):
            codes[name] = _codes(name, shape, seed)
            plain[f"{name}_scale_inv"] = _scales(name, shape, seed)
        else:
            plain[name] = _weight(config, name, shape, seed)
    return plain, codes


def directions(config: dict[str, Any]) -> Tensors:
    """A fixed random tensor for each parameter: gradients are compared along it."""
    named = {name: shape for name, shape in shapes(config).items() if is_parameter(name)}
    return {
        name: _random(0, "direction", name).standard_normal(shape) for name, shape in named.items()
    }


def tokens(config: dict[str, Any], seed: int) -> np.ndarray:
    """[BATCH, LENGTH] int32."""
    return _random(seed, "tokens").randint(0, config["vocab_size"], (BATCH, LENGTH), np.int32)


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """A folder as from the Hugging Face hub, without tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _random(seed: int, *name: str) -> np.random.RandomState:
    """Its numbers stay the same over NumPy versions, by promise."""
    return np.random.RandomState(zlib.crc32(" ".join((str(seed), *name)).encode()))


def _weight(config: dict[str, Any], name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    noise = _random(seed, name).standard_normal(shape)
    if name.endswith("norm.weight"):
        noise = 1 + 0.3 * noise
    elif name.endswith("e_score_correction_bias"):
        # Mostly below -score: the choice then differs from one that masks lost groups with 0.
        noise = -0.8 + 0.3 * noise
    elif name.endswith(".gate.weight"):
        noise *= 1.5 * shape[-1] ** -0.5
    elif name == "model.embed_tokens.weight":
        noise *= 0.3
    else:
        noise *= shape[-1] ** -0.5
    # Latents are small, so that the epsilon of their norms shows; rotary keys are not.
    if name.endswith("q_a_proj.weight"):
        noise *= 0.01
    elif name.endswith("kv_a_proj_with_mqa.weight"):
        noise[: config["kv_lora_rank"]] *= 0.01
    return noise.astype(np.float32)


def _is_quantized(config: dict[str, Any], name: str) -> bool:
    kept = (".gate.weight", "norm.weight", "e_score_correction_bias")
    return "quantization_config" in config and ".layers." in name and not name.endswith(kept)


def _codes(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any finite e4m3 number: uint8 without 127 and 255, which stand for NaN."""
    random = _random(seed, name)
    return (random.randint(0, 127, shape) + 128 * random.randint(0, 2, shape)).astype(np.uint8)


def _scales(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    blocks = [-(-size // 128) for size in shape]
    spread = _random(seed, name, "scale").uniform(0.5, 1.5, blocks)
    return (spread * shape[-1] ** -0.5 / 100).astype(np.float32)  # codes have a deviation of 100


def _decoded(codes: np.ndarray) -> np.ndarray:
    """Values of e4m3 codes (1 bit sign, 4 exponent, 3 mantissa) in float64."""
    code = codes.astype(np.int64)
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    magnitude = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return np.where(code < 128, magnitude, -magnitude)
