"""Our checkpoints as arrays that are read and written in parts.

A checkpoint is a folder of two items: `state`, nested dicts of arrays in Orbax's format, and
`document`, JSON with the config. Training writes one a step under WORKDIR/checkpoints; a converted
one stands alone and holds `parameters` and `router_bias` only.
"""

import asyncio
import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging as absl_logging

from moe_jax.config import ModelConfig, UserError
from moe_jax.fields import build, read_json
from moe_jax.interop.lazy import Index, Lazy, Tree, piece_shape, pieces, unflatten
from moe_jax.interop.manifest import faults, is_complete

WEIGHTS = ("parameters", "router_bias")


def set_up_orbax() -> None:
    """What it says and does beside reading and writing."""
    # It tells of every phase of every save, and of each thread that failed, with its stack; whoever
    # waits for the save is told as well, and tells a person.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("orbax").setLevel(logging.CRITICAL)
    # Replicas of an array write a part each, which takes a program for each shape of part. That is
    # worth its compilation for large ones only.
    array_handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**24)
    ocp.type_handlers.register_type_handler(jax.Array, array_handler, override=True)


TOKENIZER = "tokenizer"  # the folder beside weights, or in a work directory, with its files


def find_tokenizer(path: Path) -> Path:
    """The folder of a model's tokenizer, if it has one: a Hugging Face folder is its own."""
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        return path
    of_run = checkpoint.parent.parent / TOKENIZER
    trained = checkpoint.parent.name == "checkpoints" and of_run.is_dir()
    return of_run if trained else checkpoint / TOKENIZER


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at a path: itself, or the newest of a work directory or its checkpoints.

    None if there is none.
    """
    if (path / "state" / "_METADATA").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir():
            steps = [p for p in folder.iterdir() if p.name.isdecimal() and is_complete(p)]
            if steps:
                return max(steps, key=lambda p: int(p.name))
    return None


def read_checkpoint(path: Path) -> tuple[ModelConfig, Tree]:
    """The model's config and its weights: {"parameters": ..., "router_bias": ...} of `Lazy`.

    Raises:
      ValueError: the checkpoint lacks a file, holds other bytes than its manifest says, or was
        written by another version.
    """
    document = path / "document" / "metadata"
    for file in (document, path / "state" / "_METADATA"):
        if not file.is_file():
            raise UserError(f"checkpoint {path} is not whole: {file} is missing")
    if is_complete(path) and (damage := faults(path)):
        raise UserError(f"checkpoint {path} is not whole: {'; '.join(damage)}")
    config = read_json(document).get("config")
    try:
        model = build(ModelConfig, config and config.get("model"), "config.model")
    except UserError as error:
        raise UserError(f"checkpoint {path} is of another version: {error}") from None
    return model, read_arrays(path, WEIGHTS)


def read_arrays(path: Path, items: Collection[str] = ()) -> Tree:
    """A checkpoint's arrays as `Lazy`.

    Args:
      items: the groups of the state to read, all if empty.
    Raises:
      ValueError: an array is damaged.
    """
    described = read_json(path / "state" / "_METADATA")
    paths = [
        tuple(key["key"] for key in entry["key_metadata"])
        for entry in described["tree_metadata"].values()
    ]
    driver = "zarr3" if described["use_zarr3"] else "zarr"
    opened = {
        names: ts.open(_spec(path / "state", names, driver, described["use_ocdbt"]), open=True)
        for names in paths
        if not items or (names[0] in items and len(names) > 1)
    }
    leaves = {}
    for names, future in opened.items():
        try:
            leaves[names] = _lazy(future.result(), path, names)
        except ValueError as error:
            raise UserError(f"checkpoint {path} is damaged at {'/'.join(names)}: {error}") from None
    return unflatten(leaves)


def _spec(state: Path, names: tuple[str, ...], driver: str, use_ocdbt: bool) -> dict[str, Any]:
    base, name = f"file://{state.absolute()}/", ".".join(names)
    if not use_ocdbt:
        return {"driver": driver, "kvstore": f"{base}{name}/"}
    return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}


def _lazy(store: Any, path: Path, names: tuple[str, ...]) -> Lazy:
    def read(index: Index) -> np.ndarray:
        value = store[index].read().result()
        if not np.all(np.isfinite(value)):
            raise UserError(
                f"{'/'.join(names)} of checkpoint {path} holds values that are not finite numbers"
            )
        return value

    return Lazy(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), read)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `Lazy` piece by piece, in the format of an ordinary array."""

    def __init__(self, advance: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self.refusal: UserError | None = None
        self._advance = advance
        self._one_at_a_time = asyncio.Lock()

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        # Chunks as large as pieces: a larger chunk would be held in memory until it is full.
        tspec["metadata"]["chunks"] = piece_shape(value.shape, value.dtype.itemsize)
        async with self._one_at_a_time:
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            for index in pieces(value.shape, value.dtype.itemsize):
                piece = self._read(value, index)
                if piece is None:
                    # Orbax would print a traceback of what is raised here, and misses arrays of
                    # which nothing is written. All of it is removed in the end.
                    stub = [s.stop - s.start for s in index]
                    await store[index].write(np.zeros(stub, value.dtype))
                    return
                await store[index].write(piece)
                self._advance(piece.nbytes)

    def _read(self, value: Lazy, index: Index) -> np.ndarray | None:
        """None once a part cannot be read."""
        if not self.refusal:
            try:
                return value.read(index)
            except UserError as error:
                self.refusal = error
        return None


def write_checkpoint(
    path: Path,
    config: dict[str, Any],
    weights: Tree,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a checkpoint that stands alone; it appears at `path` only once it is whole.

    Args:
      config: with the model's under "model".
      weights: {"parameters": ..., "router_bias": ...} of `Lazy`.
      advance: told of every piece's bytes.
    Raises:
      ValueError: of reading a weight; nothing is left at `path` then.
    """
    set_up_orbax()
    lazy_handler = _LazyHandler(advance)
    registry = ocp.type_handlers.create_type_handler_registry(
        (Lazy, lazy_handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        document=ocp.JsonCheckpointHandler(),
    )
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(weights), document=ocp.args.JsonSave({"config": config})
    )
    new = path.absolute().with_name(path.name + ".partial")
    shutil.rmtree(new, ignore_errors=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(new, args=items)
    if lazy_handler.refusal:
        shutil.rmtree(new)
        raise lazy_handler.refusal
    new.rename(path)
