"""Trains a model.

    python -m moe_jax.main --config=configs/tiny.py --config.training.num_steps=50

Every field of the config can be set on the command line. The same command, run again, goes on from
the newest checkpoint in the work directory.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from moe_jax import command_line, platform, validation
from moe_jax.config import UserError
from moe_jax.training.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where to write; runs/<config name> by default.")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for a start by hand on many hosts."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run, for a start by hand.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's, for a start by hand.")


def main(_: list[str]) -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing; try --config=configs/tiny.py")
    config = validation.parse(CONFIG.value)
    lines = platform.start(config.mesh, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    workdir = Path(WORKDIR.value or f"runs/{command_line.config_name(CONFIG)}")
    sys.exit(train(config, workdir, lines))


if __name__ == "__main__":
    command_line.run(main)
