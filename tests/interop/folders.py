"""Tiny Hugging Face folders, without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 24,
    "moe_intermediate_size": 10,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 6,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1,
}
V2 = {name: value for name, value in V3.items() if name != "num_nextn_predict_layers"} | {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
FAMILIES = {"deepseek_v3": V3, "deepseek_v2": V2, "mixtral": MIXTRAL, "llama": LLAMA}


def shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the public form, by hand."""
    dim, vocab = raw["hidden_size"], raw["vocab_size"]
    heads, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, dim),
        "model.norm.weight": (dim,),
    }
    if not raw.get("tie_word_embeddings"):
        found["lm_head.weight"] = (vocab, dim)

    def mlp(prefix: str, hidden: int, names: str = "gate_proj up_proj down_proj") -> None:
        gate, up, down = names.split()
        found[f"{prefix}{gate}.weight"] = found[f"{prefix}{up}.weight"] = (hidden, dim)
        found[f"{prefix}{down}.weight"] = (dim, hidden)

    depth = raw.get("num_nextn_predict_layers", 0)
    for i in range(layers + depth):
        p = f"model.layers.{i}."
        found[f"{p}input_layernorm.weight"] = (dim,)
        found[f"{p}post_attention_layernorm.weight"] = (dim,)
        if "kv_lora_rank" in raw:
            key = raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
            rank, value = raw["kv_lora_rank"], raw["v_head_dim"]
            if raw["q_lora_rank"] is None:
                found[f"{p}self_attn.q_proj.weight"] = (heads * key, dim)
            else:
                found[f"{p}self_attn.q_a_proj.weight"] = (raw["q_lora_rank"], dim)
                found[f"{p}self_attn.q_a_layernorm.weight"] = (raw["q_lora_rank"],)
                found[f"{p}self_attn.q_b_proj.weight"] = (heads * key, raw["q_lora_rank"])
            found[f"{p}self_attn.kv_a_proj_with_mqa.weight"] = (rank + raw["qk_rope_head_dim"], dim)
            found[f"{p}self_attn.kv_a_layernorm.weight"] = (rank,)
            out = heads * (raw["qk_nope_head_dim"] + value)
            found[f"{p}self_attn.kv_b_proj.weight"] = (out, rank)
            found[f"{p}self_attn.o_proj.weight"] = (dim, heads * value)
        else:
            size, groups = raw["head_dim"], raw["num_key_value_heads"]
            found[f"{p}self_attn.q_proj.weight"] = (heads * size, dim)
            found[f"{p}self_attn.k_proj.weight"] = (groups * size, dim)
            found[f"{p}self_attn.v_proj.weight"] = (groups * size, dim)
            found[f"{p}self_attn.o_proj.weight"] = (dim, heads * size)
        if raw["model_type"] == "mixtral":
            found[f"{p}block_sparse_moe.gate.weight"] = (raw["num_local_experts"], dim)
            for e in range(raw["num_local_experts"]):
                mlp(f"{p}block_sparse_moe.experts.{e}.", raw["intermediate_size"], "w1 w3 w2")
        elif "n_routed_experts" in raw and i >= raw["first_k_dense_replace"]:
            found[f"{p}mlp.gate.weight"] = (raw["n_routed_experts"], dim)
            if raw["model_type"] == "deepseek_v3":
                found[f"{p}mlp.gate.e_score_correction_bias"] = (raw["n_routed_experts"],)
            for e in range(raw["n_routed_experts"]):
                mlp(f"{p}mlp.experts.{e}.", raw["moe_intermediate_size"])
            hidden = raw["n_shared_experts"] * raw["moe_intermediate_size"]
            mlp(f"{p}mlp.shared_experts.", hidden)
        else:
            mlp(f"{p}mlp.", raw["intermediate_size"])
        if i >= layers:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                found[f"{p}{name}.weight"] = (dim,)
            found[f"{p}eh_proj.weight"] = (dim, 2 * dim)
            found[f"{p}embed_tokens.weight"] = found[f"{p}shared_head.head.weight"] = (vocab, dim)
    return found


def tensors(raw: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {
        name: rng.normal(scale=0.3, size=shape).astype(
            np.float32 if name.endswith("bias") else dtype
        )
        for name, shape in shapes(raw).items()
    }
    for name in found:
        if name.endswith(".embed_tokens.weight") and ".layers." in name:
            found[name] = found["model.embed_tokens.weight"]
        if name.endswith("shared_head.head.weight"):
            found[name] = found["lm_head.weight"]
    return found


def write(folder: Path, raw: dict[str, Any], values: dict[str, np.ndarray] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    values = tensors(raw) if values is None else values
    save_file(values, folder / "model.safetensors")
    return folder
