"""Converts between Hugging Face folders and checkpoints of this project.

    python -m moe_jax.convert --source=DeepSeek-V2-Lite --target=v2_lite

    python -m moe_jax.convert --source=runs/tiny --target=tiny_hf --dtype=bfloat16

Which is which is seen from the source: a Hugging Face folder becomes a checkpoint, and a work
directory or one of its checkpoints a Hugging Face folder.
"""

from pathlib import Path

from absl import flags

from moe_jax import command_line, platform
from moe_jax.config import MeshConfig, UserError
from moe_jax.interop.conversion import convert

SOURCE = flags.DEFINE_string("source", None, "The folder to read.")
TARGET = flags.DEFINE_string("target", None, "The folder to write; it must not exist.")
DTYPE = flags.DEFINE_string(
    "dtype", "float32", "float32, bfloat16 or, for Hugging Face, float8 as DeepSeek-V3 has it."
)


def main(_: list[str]) -> None:
    if SOURCE.value is None or TARGET.value is None:
        raise UserError("give --source and --target")
    platform.start(MeshConfig())
    convert(Path(SOURCE.value), Path(TARGET.value), DTYPE.value)


if __name__ == "__main__":
    command_line.run(main)
