"""Lists, verifies, compares, exports and deletes the checkpoints of a run.

    python -m moe_jax.checkpoints runs/tiny

    python -m moe_jax.checkpoints runs/tiny --verify

    python -m moe_jax.checkpoints runs/tiny --compare=40,80

    python -m moe_jax.checkpoints runs/tiny --export=80 --target=weights

    python -m moe_jax.checkpoints runs/tiny --delete=40

An export holds the weights alone and stands by itself, for training.init_from, moe_jax.generate and
moe_jax.convert. Deleting is refused while a run holds the directory, and for the newest whole
checkpoint.
"""

from pathlib import Path

from absl import flags

from moe_jax import command_line, platform
from moe_jax.config import MeshConfig, UserError
from moe_jax.training import checkpoint_tools

VERIFY = flags.DEFINE_bool("verify", False, "Read every file and compare it with the manifest.")
COMPARE = flags.DEFINE_list("compare", None, "Two steps: what differs between them.")
EXPORT = flags.DEFINE_string("export", None, "The step whose weights to write to --target.")
TARGET = flags.DEFINE_string("target", None, "The folder of an export; it must not exist.")
DELETE = flags.DEFINE_list("delete", None, "Steps to delete, or names of damaged ones.")


def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise UserError("give a work directory, as in python -m moe_jax.checkpoints runs/tiny")
    asked = {f"--{f.name}": f.value for f in (VERIFY, COMPARE, EXPORT, DELETE)}
    asked = [name for name, value in asked.items() if value not in (None, False)]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are two things to do; ask for one at a time")
    if TARGET.value and EXPORT.value is None:
        raise UserError("--target is of no use without --export, the step whose weights to write")
    platform.start(MeshConfig())
    workdir = Path(arguments[1])
    if COMPARE.value is not None:
        lines = checkpoint_tools.compare(workdir, *COMPARE.value)
    elif EXPORT.value is not None:
        lines = checkpoint_tools.export(workdir, EXPORT.value, TARGET.value)
    elif DELETE.value is not None:
        lines = checkpoint_tools.delete(workdir, DELETE.value)
    else:
        lines = checkpoint_tools.listing(workdir, VERIFY.value)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    command_line.run(main, most_arguments=1)
