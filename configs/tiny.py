"""tiny"""

from moe_jax.config import default_config


def get_config():
    config = default_config()
    config.mesh.num_cpu_devices = 8
    config.mesh.fsdp = 2
    config.mesh.expert = 4
    return config
