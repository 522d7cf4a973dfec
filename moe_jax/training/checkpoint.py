"""Checkpoints: the state as nested dicts of plain arrays, and a small document beside it.

Nothing of NNX, optax or the mesh is stored, so a checkpoint outlives a library's version and opens
on any mesh. Orbax writes in the background and makes a checkpoint visible only once all is there;
it counts as whole once its manifest is written too, and older ones go only after that.
"""

import concurrent.futures
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.config import CheckpointConfig, UserError
from moe_jax.fields import RunError, read_json
from moe_jax.interop import manifest
from moe_jax.interop.orbax_files import set_up_orbax
from moe_jax.training import processes

Tree = Any
# What stands behind a step in the name of a folder that is no checkpoint, or not yet.
WRITING, DELETING, DAMAGED = ".orbax-checkpoint-tmp", ".deleting", ".damaged"
_TEN_DAYS, _TWENTY_MINUTES = 10 * 86400, 1200  # seconds


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
    """The checkpoints of a run under `directory`, by step; which stay, `config` says.

    Args:
      say: told for a person what is wrong with a checkpoint or a save.
    """

    def __init__(
        self, directory: Path, config: CheckpointConfig, say: Callable[[str], None] = print
    ):
        set_up_orbax()
        self.directory, self._config, self._say = directory.absolute(), config, say
        self.directory.mkdir(parents=True, exist_ok=True)
        self._is_main = jax.process_index() == 0
        if self._is_main:
            for left in (*self.directory.glob("*" + WRITING), *self.directory.glob("*" + DELETING)):
                shutil.rmtree(left)
        # Orbax measures how long it waits by the clock of the day, which may be set meanwhile. With
        # several processes, one whose own part of a save failed is waited for no longer than that.
        options = ocp.options.AsyncOptions(
            timeout_secs=_TEN_DAYS if jax.process_count() == 1 else _TWENTY_MINUTES,
            create_directories_asynchronously=False,
        )
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(async_options=options),
                state=ocp.StandardCheckpointHandler(),
                document=ocp.JsonCheckpointHandler(),
            ),
            async_options=options,
        )
        # The last steps of a save: until its manifest is written, a checkpoint does not count.
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future | None = None
        self._saving_step = 0
        self._failed = 0  # saves in a row
        self._stall = 0.0

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Of all checkpoints, whole or not."""
        folders = (path for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(path.name) for path in folders if path.name.isdecimal())

    def latest(self, before: int | None = None) -> int | None:
        """The step of the newest whole checkpoint, of a step below `before`; None: there is none.

        Newer ones that are not whole are named and set aside.

        Raises:
          UserError: there are some, and none is whole.
        """
        self.wait()
        (steps, *_) = processes.gathered(json.dumps(self.steps()))
        candidates = [step for step in json.loads(steps) if before is None or step < before]
        for step in reversed(candidates):
            share = jax.process_index(), jax.process_count()
            found = processes.gathered("; ".join(manifest.faults(self._path(step), *share)))
            faults = "; ".join(text for text in found if text)
            if not faults:
                return step
            self._say(f"damaged     checkpoint {step} is not whole and set aside: {faults}")
            if self._is_main:
                for left in self.directory.glob("*" + DAMAGED):
                    shutil.rmtree(left)
                self._path(step).rename(self.directory / f"{step}{DAMAGED}")
        if candidates:
            raise UserError(
                f"no checkpoint in {self.directory} is whole; the newest that was found is left as "
                f"*{DAMAGED}: give another --workdir, or the same again to begin anew"
            )
        return None

    def save(self, step: int, state: Tree, document: dict[str, Any]) -> None:
        """Starts to write a checkpoint; the caller may donate `state` at once.

        A save that fails is told of and counted; nothing else is harmed.

        Args:
          step: batches seen.
          state: nested dicts of arrays.
          document: JSON-able, the same on every process.
        Raises:
          RunError: `config.max_failed_saves` failed in a row.
        """
        begin = time.perf_counter()
        self.wait()
        # On CPU the writer may read the array itself, which the next step could then not donate;
        # elsewhere it copies to the host before it returns.
        if jax.default_backend() == "cpu":
            state = jax.tree.map(_copied, state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), document=ocp.args.JsonSave(document)
        )
        self._saving_step = step
        try:
            self._checkpointer.save(self._path(step), args=items)
        except Exception as error:  # a disk, a network, a quota: whatever it is, training goes on
            self._failure(error)
        else:
            self._saving = self._background.submit(self._finish, step)
        self._stall += time.perf_counter() - begin

    def stall_seconds(self) -> float:
        """For how long saves have held up the caller since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def _finish(self, step: int) -> None:
        self._checkpointer.wait_until_finished()
        manifest.write(self._path(step), jax.process_index(), jax.process_count())
        if self._is_main:
            self._prune()

    def _prune(self) -> None:
        """Deletes what need not be kept; a checkpoint that is not whole is none to count on."""
        saved = {
            step: self.document(step).get("eval_loss")
            for step in self.steps()
            if manifest.is_complete(self._path(step))
        }
        for step in saved.keys() - kept(saved, self._config):
            # Renamed first: half deleted, it would pass for damaged.
            going = self._path(step).rename(self.directory / f"{step}{DELETING}")
            shutil.rmtree(going)

    def _failure(self, error: BaseException) -> None:
        self._failed += 1
        self._drain()
        if self._is_main:
            for left in self.directory.glob(f"{self._saving_step}*{WRITING}*"):
                shutil.rmtree(left, ignore_errors=True)
        most = self._config.max_failed_saves
        what = self._what_failed(error)
        if self._failed >= most:
            raise RunError(
                f"{what}, as the {self._failed} last ones (config.checkpoint.max_failed_saves="
                f"{most}); make room in {self.directory}, or write access, and start again"
            )
        self._say(f"not saved   {what}; training goes on, {most - self._failed} more may fail")

    def _drain(self) -> None:
        """Forgets what else went wrong in a save that failed.

        Orbax raises it one by one, and what is left in the next save, or when it is closed.
        """
        for _ in range(100):
            try:
                return self._checkpointer.wait_until_finished()
            except Exception:  # of a save that has been told of
                continue

    def document(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return read_json(self._path(step) / "document" / "metadata")

    def restore(self, step: int, abstract: Tree) -> Tree:
        """The state, laid out as `abstract` says: a tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          ValueError: names, shapes or dtypes differ from what is stored; all of them are listed.
        """
        metadata: Any = self._checkpointer.metadata(self._path(step)).item_metadata
        stored = _described(metadata["state"].tree)
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
        return self._checkpointer.restore(self._path(step), args=args)["state"]

    def tell(self) -> None:
        """Tells of a save that failed meanwhile.

        Raises:
          RunError: see `save`.
        """
        if self._saving and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Until what is being written is on disk, or has failed.

        Raises:
          RunError: see `save`.
        """
        saving, self._saving = self._saving, None
        if saving:
            error = saving.exception()
            if error:
                self._failure(error)
            else:
                self._failed = 0

    def close(self) -> None:
        """Waits for what is being written; if it fails, that is told and raises nothing."""
        saving, self._saving = self._saving, None
        if saving and (error := saving.exception()):
            self._say(f"not saved   {self._what_failed(error)}")
        self._background.shutdown()
        self._drain()
        self._checkpointer.close()

    def _what_failed(self, error: BaseException) -> str:
        return f"checkpoint {self._saving_step} could not be written ({_reason(error)})"


def kept(saved: dict[int, float | None], config: CheckpointConfig) -> set[int]:
    """The steps whose checkpoints stay.

    Args:
      saved: the held-out loss at each, None where it was not measured.
    """
    newest = sorted(saved)[-config.keep :]
    every = config.keep_every_steps
    measured = [(loss, -step) for step, loss in saved.items() if loss is not None]
    best = [-step for _, step in sorted(measured)[: config.keep_best]]
    return {*newest, *best, *(step for step in saved if every and step % every == 0)}


def _copied(x: jax.Array) -> jax.Array:
    """Without a program, which would have to be compiled for every shape."""
    return jax.device_put(x, x.sharding, may_alias=False)


def _reason(error: BaseException) -> str:
    """The first line that says something."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _described(tree: Tree) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }
