"""Llama 3 405B, dense: what DeepSeek-V3 is compared with.

    python -m moe_jax.main --config=configs/llama3_405b.py
    python -m moe_jax.main --config=configs/llama3_405b.py:tiny    # the same on a laptop

Sizes and schedule are those of the report (arXiv 2407.21783, sections 3.2 and 3.4.1), at the 8,192
tokens and the 16 M a step of most of pre-training.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from moe_jax.sizes import sized


def get_config(size: str = "full") -> ConfigDict:
    small = runpy.run_path(str(Path(__file__).with_name("llama3_8b.py")))
    config = small["get_config"]()

    model = config.model
    model.hidden_size = 16384
    model.num_hidden_layers = 126
    model.first_k_dense_replace = 126
    model.intermediate_size = 53248
    model.attention.num_heads = 128

    config.optimizer.peak_lr = 8e-5
    config.optimizer.final_lr = 8e-7
    config.training.tokens_per_step = 2048 * 8192
    config.training.num_steps = 930_000  # 15.6 T tokens
    return sized(config, size)
