"""DeepSeek-V2 in pre-training: 236 B parameters, 21 B per token.

    python -m moe_jax.main --config=configs/deepseek_v2.py
    python -m moe_jax.main --config=configs/deepseek_v2.py:tiny    # the same on a laptop

Sizes, routing, losses, dropping and recipe are those of the report (arXiv 2405.04434, sections 2
and 3.1).
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.sizes import sized

BILLION = 10**9


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()

    model = config.model
    model.vocab_size = 102400
    model.hidden_size = 5120
    model.num_hidden_layers = 60
    model.first_k_dense_replace = 1
    model.intermediate_size = 12288
    model.max_position_embeddings = 4096
    model.initializer_range = 0.006
    attention = model.attention
    attention.num_heads = 128
    attention.q_lora_rank = 1536
    attention.kv_lora_rank = 512
    attention.qk_nope_head_dim = 128
    attention.qk_rope_head_dim = 64
    attention.v_head_dim = 128
    moe = model.moe
    moe.num_experts = 160
    moe.num_experts_per_tok = 6
    moe.num_shared_experts = 2
    moe.intermediate_size = 1536
    moe.scoring_func = "softmax"
    moe.topk_method = "group_limited_greedy"
    moe.num_expert_groups = 8
    moe.num_limited_groups = 3
    moe.norm_topk_prob = False
    moe.routed_scaling_factor = 16.0
    moe.sequence_loss_weight = 0.0
    moe.expert_loss_weight = 0.003
    moe.device_loss_weight = 0.05
    moe.communication_loss_weight = 0.02
    moe.num_device_groups = 8
    moe.token_dropping = "device"
    moe.capacity_factor = 1.0
    moe.capacity_group = 8  # a row for each of the device groups

    moe.exchange_parts = 2
    config.mesh.expert = 8
    optimizer, data, training = config.optimizer, config.data, config.training
    optimizer.peak_lr = optimizer.final_lr = optimizer.warmup_steps = None
    optimizer.lr_phases = (
        {"value": 2.4e-4, "until_tokens": 2000 * 2304 * 4096, "kind": "linear"},
        {"value": 2.4e-4, "until_tokens": 4860 * BILLION},  # 60 %
        {"value": 0.316 * 2.4e-4, "until_tokens": 7290 * BILLION},  # 90 %
        {"value": 0.316**2 * 2.4e-4},
    )
    data.num_streams = 768
    training.tokens_per_step = 9216 * 4096
    training.micro_batches = 8
    training.num_steps = 0
    data.stages = (
        {
            "sequence_length": 4096,
            "until_tokens": 225 * BILLION,
            "from_tokens_per_step": 2304 * 4096,
        },
        {"sequence_length": 4096, "until_tokens": 8100 * BILLION},
    )
    config.checkpoint.every_steps = 500
    return sized(config, size)
