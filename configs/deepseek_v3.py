"""DeepSeek-V3 in pre-training: 671 B parameters, 37.6 B per token, 11.6 B that predict ahead.

    python -m moe_jax.main --config=configs/deepseek_v3.py
    python -m moe_jax.main --config=configs/deepseek_v3.py:long_context
    python -m moe_jax.main --config=configs/deepseek_v3.py:tiny    # the same on a laptop

Sizes, routing and recipe are those of the report (arXiv 2412.19437, sections 2, 4.2 and 4.3), but
for the batch: 4,096 to 16,384 rows for 3,072 to 15,360, which do not divide over the 2,048 devices
that it ran on. With `long_context`, 1,000 steps of 32 K tokens a row and 1,000 of 128 K follow, of
2,048 and 512 rows for 1,920 and 480; as many devices as the last has rows, or fewer, can run them.
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.sizes import sized

BILLION = 10**9


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()

    model = config.model
    model.vocab_size = 129280
    model.hidden_size = 7168
    model.num_hidden_layers = 61
    model.first_k_dense_replace = 3
    model.intermediate_size = 18432
    model.max_position_embeddings = 4096
    model.initializer_range = 0.006
    model.num_nextn_predict_layers = 1
    attention = model.attention
    attention.num_heads = 128
    attention.q_lora_rank = 1536
    attention.kv_lora_rank = 512
    attention.qk_nope_head_dim = 128
    attention.qk_rope_head_dim = 64
    attention.v_head_dim = 128
    moe = model.moe
    moe.num_experts = 256
    moe.num_experts_per_tok = 8
    moe.num_shared_experts = 1
    moe.intermediate_size = 2048
    moe.num_expert_groups = 8
    moe.num_limited_groups = 4

    moe.exchange_parts = 2
    config.mesh.expert = 64
    optimizer, data, training = config.optimizer, config.data, config.training
    optimizer.peak_lr = optimizer.final_lr = optimizer.warmup_steps = None
    optimizer.lr_phases = (
        {"value": 2.2e-4, "until_tokens": 2000 * 3072 * 4096, "kind": "linear"},
        {"value": 2.2e-4, "until_tokens": 10_000 * BILLION},
        {"value": 2.2e-5, "until_tokens": 14_300 * BILLION, "kind": "cosine"},
        {"value": 2.2e-5, "until_tokens": 14_633 * BILLION},
        {"value": 7.3e-6},
    )
    moe.bias_update_speed = (
        {"value": 0.001, "until_tokens": 14_300 * BILLION},
        {"value": 0.0},
    )
    training.mtp_loss_weight = (
        {"value": 0.3, "until_tokens": 10_000 * BILLION},
        {"value": 0.1},
    )
    data.mask_documents = False
    data.num_streams = 512
    training.tokens_per_step = 16384 * 4096
    training.micro_batches = 8
    training.num_steps = 0
    end = 14_800 * BILLION
    data.stages = (
        {
            "sequence_length": 4096,
            "until_tokens": 469 * BILLION,
            "from_tokens_per_step": 4096 * 4096,
        },
        {"sequence_length": 4096, "until_tokens": end},
    )
    if size == "long_context":
        size = "full"
        model.max_position_embeddings = 131072
        model.rope.mscale = model.rope.mscale_all_dim = 1.0
        for rows, length in ((2048, 32768), (512, 131072)):
            end += 1000 * rows * length
            data.stages += (
                {
                    "sequence_length": length,
                    "until_tokens": end,
                    "tokens_per_step": rows * length,
                    "micro_batches": rows // 512,
                    "rope_factor": 40.0,
                },
            )
    config.checkpoint.every_steps = 500
    return sized(config, size)
