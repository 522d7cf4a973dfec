"""DeepSeek-V2-Lite in pre-training: 15.7 B parameters, 2.7 B per token with embedding and head.

    python -m moe_jax.main --config=configs/deepseek_v2_lite.py
    python -m moe_jax.main --config=configs/deepseek_v2_lite.py:tiny    # the same on a laptop

Sizes and recipe are those of DeepSeek-V2's report (arXiv 2405.04434, appendix B). Queries are not
compressed, and routing knows no groups.
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.sizes import sized

BILLION = 10**9


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()

    model = config.model
    model.vocab_size = 102400
    model.hidden_size = 2048
    model.num_hidden_layers = 27
    model.first_k_dense_replace = 1
    model.intermediate_size = 10944
    model.max_position_embeddings = 4096
    model.initializer_range = 0.006
    attention = model.attention
    attention.num_heads = 16
    attention.q_lora_rank = None
    attention.kv_lora_rank = 512
    attention.qk_nope_head_dim = 128
    attention.qk_rope_head_dim = 64
    attention.v_head_dim = 128
    moe = model.moe
    moe.num_experts = 64
    moe.num_experts_per_tok = 6
    moe.num_shared_experts = 2
    moe.intermediate_size = 1408
    moe.scoring_func = "softmax"
    moe.topk_method = "greedy"
    moe.num_expert_groups = 1
    moe.num_limited_groups = 1
    moe.norm_topk_prob = False
    moe.routed_scaling_factor = 1.0
    moe.sequence_loss_weight = 0.0
    moe.expert_loss_weight = 0.001

    moe.exchange_parts = 2
    config.mesh.expert = 8
    optimizer, data, training = config.optimizer, config.data, config.training
    optimizer.peak_lr = optimizer.final_lr = optimizer.warmup_steps = None
    optimizer.lr_phases = (
        {"value": 4.2e-4, "until_tokens": 2000 * 4608 * 4096, "kind": "linear"},
        {"value": 4.2e-4, "until_tokens": 4560 * BILLION},  # 80 %
        {"value": 0.316 * 4.2e-4, "until_tokens": 5130 * BILLION},  # 90 %
        {"value": 0.316**2 * 4.2e-4},
    )
    data.num_streams = 512
    data.stages = ({"sequence_length": 4096, "until_tokens": 5700 * BILLION},)
    training.tokens_per_step = 4608 * 4096
    training.micro_batches = 9
    training.num_steps = 0
    config.checkpoint.every_steps = 500
    return sized(config, size)
