"""Switch Transformer's routing in a decoder of the size of Switch-Base with 128 experts.

    python -m moe_jax.main --config=configs/switch_base.py
    python -m moe_jax.main --config=configs/switch_base.py:tiny    # the same on a laptop

Each token goes to its best expert, as far as that expert's capacity reaches; what exceeds it passes
by (arXiv 2101.03961, section 2). Sizes are those of table 9 there. The paper's model is an encoder
and decoder with experts in every second layer; here each layer of a decoder has them, and experts
are SwiGLU. The z-loss came later (ST-MoE, arXiv 2202.08906, section 3.3).
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.sizes import sized


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()

    model = config.model
    model.vocab_size = 32128
    model.hidden_size = 768
    model.num_hidden_layers = 12
    model.first_k_dense_replace = 0
    model.max_position_embeddings = 512
    model.initializer = "fan_in"
    model.initializer_range = 0.1
    attention = model.attention
    attention.kind = "grouped_query"
    attention.num_heads = 12
    attention.num_key_value_heads = 12
    attention.head_dim = 64
    moe = model.moe
    moe.num_experts = 128
    moe.num_experts_per_tok = 1
    moe.num_shared_experts = 0
    moe.intermediate_size = 2048
    moe.scoring_func = "softmax"
    moe.topk_method = "greedy"
    moe.num_expert_groups = 1
    moe.num_limited_groups = 1
    moe.norm_topk_prob = False
    moe.routed_scaling_factor = 1.0
    moe.sequence_loss_weight = 0.0
    moe.switch_loss_weight = 0.01
    moe.z_loss_weight = 0.001
    moe.token_dropping = "expert"
    moe.capacity_factor = 1.25

    config.mesh.expert = 8
    config.optimizer.peak_lr = 1e-3
    config.optimizer.final_lr = 1e-5
    config.optimizer.warmup_steps = 10_000
    config.data.num_streams = 256
    config.data.stages = ({"sequence_length": 512},)
    config.training.tokens_per_step = 2048 * 512
    config.training.num_steps = 550_000
    config.checkpoint.every_steps = 1000
    return sized(config, size)
