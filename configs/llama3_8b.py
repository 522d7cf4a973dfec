"""Llama 3 8B, dense, with grouped-query attention.

    python -m moe_jax.main --config=configs/llama3_8b.py
    python -m moe_jax.main --config=configs/llama3_8b.py:tiny    # the same on a laptop

Sizes and learning rate are those of the report (arXiv 2407.21783, table 3), at the 8,192 tokens of
most of pre-training.
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.sizes import sized


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()

    model = config.model
    model.vocab_size = 128256
    model.hidden_size = 4096
    model.num_hidden_layers = 32
    model.first_k_dense_replace = 32
    model.intermediate_size = 14336
    model.max_position_embeddings = 8192
    model.rms_norm_eps = 1e-5
    attention = model.attention
    attention.kind = "grouped_query"
    attention.num_heads = 32
    attention.num_key_value_heads = 8
    attention.head_dim = 128
    model.rope.theta = 500000.0
    model.rope.interleaved = False

    config.optimizer.peak_lr = 3e-4
    config.optimizer.final_lr = 3e-6
    config.optimizer.warmup_steps = 8000
    config.data.num_streams = 256
    config.data.stages = ({"sequence_length": 8192},)
    config.training.tokens_per_step = 1024 * 8192
    config.training.num_steps = 1_860_000  # 15.6 T tokens
    config.checkpoint.every_steps = 500
    return sized(config, size)
