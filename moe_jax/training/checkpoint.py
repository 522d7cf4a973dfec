"""Checkpoints: the state as nested dicts of plain arrays, and a small document beside it.

Nothing of NNX, optax or the mesh is stored, so a checkpoint outlives a library's version and opens
on any mesh. Orbax writes in the background and makes a checkpoint visible only once it is whole.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.config import UserError
from moe_jax.interop.orbax_files import quiet

Tree = Any


def check_writable(directory: Path) -> None:
    """Makes the directory.

    Raises:
      ValueError: it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the work directory {directory}: {error.strerror}; "
            "give another with --workdir"
        ) from None


class Checkpoints:
    """The newest `keep` checkpoints of a run under `directory`, by step."""

    def __init__(self, directory: Path, keep: int):
        quiet()
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            # Named, so that a checkpoint can be described before anything is saved or restored.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "document": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, document: dict[str, Any]) -> None:
        """Starts to write a checkpoint; the caller may donate `state` at once.

        Args:
          step: batches seen.
          state: nested dicts of arrays.
          document: JSON-able, the same on every process.
        """
        # On CPU the writer may read the array itself, which the next step could then not donate;
        # elsewhere it copies to the host before it returns.
        if jax.default_backend() == "cpu":
            state = jax.tree.map(jnp.copy, state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), document=ocp.args.JsonSave(document)
            ),
        )

    def document(self, step: int) -> dict[str, Any]:
        """What was saved beside the state.

        Raises:
          ValueError: the checkpoint is not whole, as after a copy that broke off.
        """
        if not (self.directory / str(step) / "document").is_dir():
            raise UserError(
                f"checkpoint {step} in {self.directory} is not whole: its document is missing; "
                "remove that folder to go on from the one before"
            )
        args = ocp.args.Composite(document=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["document"]

    def restore(self, step: int, abstract: Tree) -> Tree:
        """The state, laid out as `abstract` says: a tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          ValueError: names, shapes or dtypes differ from what is stored; all of them are listed.
        """
        stored = _described(self._manager.item_metadata(step)["state"].tree)
        wanted = _described(abstract)
        differing = [
            f"{name} is {stored.get(name, 'missing')} in the checkpoint and "
            f"{wanted.get(name, 'absent')} in this run"
            for name in sorted(stored.keys() | wanted.keys())
            if stored.get(name) != wanted.get(name)
        ]
        if differing:
            raise UserError(
                f"checkpoint {step} in {self.directory} does not fit this run: "
                + "; ".join(differing)
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args)["state"]

    def wait(self) -> None:
        """Until what is being written is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _described(tree: Tree) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }
