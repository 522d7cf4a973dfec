"""Writes deepseek_v3_reference.npz: a tiny DeepSeek-V3 run by Hugging Face transformers.

The file holds the weights under transformers' names, tokens, logits and the mean loss. It was made
in an environment of its own, which the tests do not need:

    pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/models/make_deepseek_v3_reference.py

The settings are not stored; `SETTINGS` in test_deepseek_v3_reference.py repeats them in our names.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

OUTPUT = Path(__file__).with_name("deepseek_v3_reference.npz")


def make_model() -> transformers.DeepseekV3ForCausalLM:
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=10,  # not the query/key head dim, nor its unrotated part
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-3,  # large enough to be seen; the norms on the latents keep their 1e-6
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        rope_interleave=True,
        num_mtp_layers=0,
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = transformers.DeepseekV3ForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted(model.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.copy_(1 + 0.3 * noise)
        elif name.endswith("e_score_correction_bias"):
            # Mostly below -score: the choice then differs from one that masks lost groups with 0.
            tensor.copy_(-0.8 + 0.3 * noise)
        elif name == "model.embed_tokens.weight":
            tensor.copy_(noise)
        else:
            tensor.copy_(0.15 * noise)
    return model


def check_routing(model: transformers.DeepseekV3ForCausalLM, inputs: dict) -> None:
    """Routing must be varied, sensitive to what it should be, and far from ties."""
    for name, gate in model.named_modules():
        if not name.endswith("mlp.gate"):
            continue
        scores = inputs[name][0].sigmoid()
        biased = scores + gate.e_score_correction_bias
        chosen = torch.sort(inputs[name][2], dim=-1)[0]
        groups = biased.view(-1, 2, 4).topk(2, dim=-1)[0].sum(-1)
        kept = torch.nn.functional.one_hot(groups.argmax(-1), 2).bool().repeat_interleave(4, 1)
        best = biased.masked_fill(~kept, float("-inf")).topk(3, dim=-1)[0]
        gap = min((groups[:, 0] - groups[:, 1]).abs().min(), (best[:, 1] - best[:, 2]).min())
        print(name, "experts used", chosen.unique().numel(), "smallest gap", float(gap))
        assert gap > 1e-4, "a choice is so close that rounding could flip it"
        assert chosen.unique().numel() >= 6

        def differing(other: torch.Tensor, chosen: torch.Tensor = chosen) -> int:
            return int((torch.sort(other, dim=-1)[0] != chosen).any(-1).sum())

        others = {
            "masking with 0": biased.masked_fill(~kept, 0.0).topk(2)[1],
            "no groups": biased.topk(2)[1],
            "no bias": scores.masked_fill(~kept, float("-inf")).topk(2)[1],
        }
        for label, other in others.items():
            print(f"  {label}: {differing(other)} of {len(chosen)} tokens choose otherwise")
            assert differing(other) > 0, label


@torch.no_grad()
def main() -> None:
    model = make_model()
    inputs = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(
                lambda module, args, output, name=name: inputs.update({name: output})
            )
    tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    result = model(input_ids=tokens, labels=tokens, use_cache=False)
    check_routing(model, inputs)
    np.savez_compressed(
        OUTPUT,
        tokens=tokens.numpy().astype(np.int32),
        logits=result.logits.numpy(),
        loss=result.loss.numpy(),
        **{name: tensor.numpy() for name, tensor in model.state_dict().items()},
    )
    print(f"{OUTPUT.name}: {OUTPUT.stat().st_size} bytes, loss {float(result.loss):.4f}")


if __name__ == "__main__":
    main()
