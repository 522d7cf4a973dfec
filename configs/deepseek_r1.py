"""DeepSeek-R1: DeepSeek-V3's architecture with the defaults of fine-tuning.

    python -m moe_jax.main --config=configs/deepseek_r1.py \\
        --config.training.init_from=DeepSeek-V3-Base --config.data.source='answers/*.jsonl'

The released weights read 163,840 positions through YaRN (V3, section 4.3). Router biases stay as
pre-training left them, and the documents of a row do not see each other (V3, section 5.1).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from moe_jax.sizes import sized


def get_config(size: str = "full") -> ConfigDict:
    pre_training = runpy.run_path(str(Path(__file__).with_name("deepseek_v3.py")))
    config = pre_training["get_config"]()

    config.model.max_position_embeddings = 163840
    rope = config.model.rope
    rope.scaling = "yarn"
    rope.factor = 40.0
    rope.original_max_position_embeddings = 4096
    rope.mscale = 1.0
    rope.mscale_all_dim = 1.0
    config.model.moe.bias_update_speed = 0.0

    # V3, section 5.1: a cosine from 5e-6 to 1e-6; R1, section 2.3.3: two epochs of 800 K samples.
    config.optimizer.lr_phases = None
    config.optimizer.peak_lr = 5e-6
    config.optimizer.final_lr = 1e-6
    config.optimizer.warmup_steps = 0
    config.data.mask_documents = True
    config.data.num_streams = 256
    config.training.tokens_per_step = 512 * 4096
    config.training.micro_batches = 1
    config.training.num_steps = 3000
    config.data.stages = ({"sequence_length": 4096},)
    config.training.mtp_loss_weight = 0.1
    return sized(config, size)
