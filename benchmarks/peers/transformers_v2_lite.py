"""A part of `benchmarks.gpu`: the step's model in transformers, with AdamW, all in bfloat16.

Arguments: "eager" or "compiled".
"""

import json
import sys

import torch
import transformers

from benchmarks.gpu_shapes import STEPS
from benchmarks.timing import median_seconds

# V2-Lite's, and sizes to try the program with.
SIZES = {
    False: dict(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_attention_heads=16,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408,
    ),
    True: dict(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_attention_heads=4,
        kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=64,
    ),
}  # fmt: skip


def main() -> None:
    mode, quick = sys.argv[1], "quick" in sys.argv[2:]
    shape, sizes = STEPS[quick], SIZES[quick]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        **sizes,
        num_hidden_layers=shape.layers,
        num_key_value_heads=sizes["num_attention_heads"],
        q_lora_rank=None,
        first_k_dense_replace=1,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        max_position_embeddings=shape.length,
        use_cache=False,
        experts_implementation="grouped_mm",
    )
    with torch.device(device):
        model = transformers.DeepseekV2ForCausalLM(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, sizes["vocab_size"], (shape.rows, shape.length), device=device)

    def loss_of(tokens):
        return model(tokens, labels=tokens).loss

    if mode == "compiled":
        loss_of = torch.compile(loss_of)

    def run():
        loss_of(tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = median_seconds(run, wait, calls=3)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"seconds": seconds, **versions}))


if __name__ == "__main__":
    main()
