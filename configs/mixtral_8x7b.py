"""Mixtral 8x7B: 46.7 B parameters, 12.9 B per token.

    python -m moe_jax.main --config=configs/mixtral_8x7b.py
    python -m moe_jax.main --config=configs/mixtral_8x7b.py:tiny    # the same on a laptop

Sizes are those of the paper (arXiv 2401.04088, table 1) and of the released configuration. How it
was trained is not published; the schedule here is a guess.
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.sizes import sized


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()

    model = config.model
    model.vocab_size = 32000
    model.hidden_size = 4096
    model.num_hidden_layers = 32
    model.first_k_dense_replace = 0
    model.max_position_embeddings = 32768
    model.rms_norm_eps = 1e-5
    attention = model.attention
    attention.kind = "grouped_query"
    attention.num_heads = 32
    attention.num_key_value_heads = 8
    attention.head_dim = 128
    model.rope.theta = 1e6
    model.rope.interleaved = False
    moe = model.moe
    moe.num_experts = 8
    moe.num_experts_per_tok = 2
    moe.num_shared_experts = 0
    moe.intermediate_size = 14336
    moe.scoring_func = "softmax"
    moe.topk_method = "greedy"
    moe.num_expert_groups = 1
    moe.num_limited_groups = 1
    moe.norm_topk_prob = True
    moe.routed_scaling_factor = 1.0
    moe.sequence_loss_weight = 0.0
    moe.mixtral_loss_weight = 0.02

    config.mesh.expert = 8
    config.optimizer.peak_lr = 3e-4
    config.optimizer.final_lr = 3e-5
    config.optimizer.warmup_steps = 2000
    config.data.num_streams = 128
    config.data.stages = ({"sequence_length": 8192},)
    config.training.tokens_per_step = 512 * 8192
    config.training.num_steps = 500_000
    config.checkpoint.every_steps = 500
    return sized(config, size)
