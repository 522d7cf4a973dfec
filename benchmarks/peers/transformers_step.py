"""One contender: Hugging Face transformers' DeepSeek-V3 in torch, with AdamW.

Arguments: the dtype (bfloat16: autocast), the implementation of the experts, and "compiled" or
"eager".
"""

import sys

import torch
import transformers

from benchmarks.contender import serve
from benchmarks.shape import SHAPE


def main() -> None:
    dtype, experts, mode = sys.argv[1:]
    s = SHAPE
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=s["vocab"],
        hidden_size=s["dim"],
        intermediate_size=s["dense_ffn"],
        moe_intermediate_size=s["expert_ffn"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["heads"],
        n_shared_experts=s["shared"],
        n_routed_experts=s["experts"],
        num_experts_per_tok=s["top_k"],
        n_group=1,
        topk_group=1,
        first_k_dense_replace=s["dense_layers"],
        kv_lora_rank=s["kv_lora"],
        q_lora_rank=s["q_lora"],
        qk_rope_head_dim=s["rope"],
        qk_nope_head_dim=s["nope"],
        v_head_dim=s["value"],
        max_position_embeddings=s["length"],
        use_cache=False,
        experts_implementation=experts,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, s["vocab"], (s["batch"], s["length"]))

    def loss_of(tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return model(tokens, labels=tokens).loss

    if mode == "compiled":
        loss_of = torch.compile(loss_of)

    def run():
        loss_of(tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    serve(run, {"torch": torch.__version__, "transformers": transformers.__version__})


if __name__ == "__main__":
    main()
