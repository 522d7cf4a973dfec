"""DeepSeek-V3 in pre-training: 671 B parameters, 37.6 B per token, 11.6 B that predict ahead.

    python -m moe_jax.main --config=configs/deepseek_v3.py
    python -m moe_jax.main --config=configs/deepseek_v3.py:tiny    # the same on a laptop

Sizes, routing and schedule are those of the report (arXiv 2412.19437, sections 2 and 4.2), but for
the learning rate, warm-up and one cosine here, and the batch: 16,384 rows, since the 15,360 of the
end of training do not divide over the 2,048 devices that it ran on.
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config, sized


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
    config.optimizer.peak_lr = 2.2e-4
    config.optimizer.final_lr = 2.2e-5
    config.optimizer.warmup_steps = 2000
    config.data.mask_documents = False
    config.data.num_streams = 1024
    config.data.stages = ({"sequence_length": 4096, "until_tokens": None},)
    config.training.tokens_per_step = 16384 * 4096
    config.training.micro_batches = 8
    config.training.num_steps = 220_500  # 14.8 T tokens
    # Section 4.2.
    config.training.mtp_loss_weight = (
        {"value": 0.3, "until_tokens": 10 * 10**12},
        {"value": 0.1},
    )
    config.checkpoint.every_steps = 500
    return sized(config, size)
