"""Hugging Face folders: config.json and safetensors.

model = load("DeepSeek-V2-Lite")
logits = model(tokens)
save(model, "copy")
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from moe_jax import sharding
from moe_jax.config import MeshConfig, ModelConfig, PrecisionConfig, UserError
from moe_jax.fields import read_json
from moe_jax.interop import families, names
from moe_jax.interop.lazy import (
    Lazy,
    LazyFp8,
    Tree,
    flatten,
    from_array,
    place,
    place_fp8,
    unflatten,
)
from moe_jax.interop.tensors import BLOCK, INDEX, SCALE, SINGLE, Tensors, quantized
from moe_jax.models.language_model import LanguageModel, abstract_weights

DTYPES = ("float32", "bfloat16", "float8")
SHARD_BYTES = 4 * 2**30


def load(
    path: str | Path, dtype: str = "bfloat16", mesh: Mesh | None = None, *, keep_fp8: bool = False
) -> LanguageModel:
    """The model of a Hugging Face folder, ready to call.

    Args:
      path: of the folder.
      dtype: of the weights in memory and of the operands of products, "float32" or "bfloat16".
      mesh: to spread the model over, each device reading its own part; one device if None.
      keep_fp8: what the folder has in FP8 stays so in memory, and is widened where it is used.
    Raises:
      ValueError: whatever in the folder contradicts its config; all such tensors are listed.
    """
    mesh = mesh or one_device()
    config, lazy, _ = read_folder(Path(path), keep_fp8)
    weights = place_weights(config, lazy, mesh, jnp.dtype(dtype), decoding=True)
    return LanguageModel(config, PrecisionConfig(compute_dtype=dtype), mesh, *weights)


def save(model: LanguageModel, path: str | Path, dtype: str = "float32") -> None:
    """Writes a folder that `transformers` opens.

    Args:
      model: on the devices of this process.
      dtype: "float32", "bfloat16", or "float8": E4M3 with a scale per block, as DeepSeek-V3's
        public weights are, and bfloat16 for the rest.
    Raises:
      ValueError: the folder is not empty, no family of Hugging Face's has the model's options, or
        the model has redundant experts or weights that stay in FP8.
    """
    if model.placement:
        raise UserError("a model with redundant experts cannot be saved; save the one without")
    if model.fp8_weights:
        raise UserError("a model whose weights stay in FP8 cannot be saved; load it without that")
    weights = {"parameters": model.parameters, "router_bias": model.router_bias}
    write_folder(Path(path), model.config, jax.tree.map(from_array, weights), dtype)


def one_device() -> Mesh:
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def place_weights(
    config: ModelConfig, weights: Tree, mesh: Mesh, dtype: Any, *, decoding: bool
) -> tuple[Tree, Tree]:
    """Parameters, as `dtype`, and router biases on a mesh; each device reads its own part.

    Args: see `abstract_weights`.
    Raises:
      ValueError: see `check_fit`.
    """
    check_fit(config, weights)
    found = flatten(weights)
    parameters, router_bias = abstract_weights(config, mesh, dtype, decoding=decoding)
    wanted = flatten({"parameters": parameters, "router_bias": router_bias})
    placed = unflatten(
        {
            path: (place_fp8 if isinstance(found[path], LazyFp8) else place)(found[path], leaf)
            for path, leaf in wanted.items()
        }
    )
    return placed["parameters"], placed.get("router_bias", {})


def check_fit(config: ModelConfig, weights: Tree) -> None:
    """Compares a tree of arrays with what the model needs.

    Raises:
      ValueError: arrays that are missing, left over or of a wrong shape; all are listed.
    """
    found = {"/".join(path): tuple(leaf.shape) for path, leaf in flatten(weights).items()}
    wanted = {"/".join(path): shape for path, shape in _our_shapes(config).items()}
    _compare(wanted, found, "the checkpoint does not fit its config")


def read_folder(path: Path, keep_fp8: bool = False) -> tuple[ModelConfig, Tree, list[str]]:
    """The model's config, its weights as a tree of `Lazy`, and notes for a person.

    Args:
      keep_fp8: arrays that are in FP8 are `LazyFp8`.
    Raises:
      ValueError: see `load`; values that are not finite are found when they are read.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is no Hugging Face folder: it has no config.json")
    config = families.from_huggingface(read_json(file))
    tensors = Tensors(path)
    config, notes = _without_absent_depths(config, tensors)

    found = names.parts(config)
    shapes = _our_shapes(config)
    wanted = {name: names.tensor_shape(part, shapes[part.path]) for name, part in found.items()}
    repeats = {name: of for name, of in names.repeated(config).items() if name in tensors.shapes}
    here = {name: shape for name, shape in tensors.shapes.items() if name not in repeats}
    _compare(wanted, here, f"{path} does not fit its config.json")
    differing = [f"{a} differs from {b}" for a, b in repeats.items() if not tensors.equal(a, b)]
    if differing:
        raise UserError(f"{path}: {'; '.join(differing)}, and both are the same weights")

    leaves: dict[names.Path, Lazy | LazyFp8] = {}
    for ours, by_place in names.by_array(found).items():
        if keep_fp8 and all(tensors.is_fp8(name) for name, _ in by_place.values()):
            leaves[ours] = _in_fp8(shapes[ours], by_place, tensors)
            continue
        kinds = {tensors.dtype(name) for name, _ in by_place.values()}
        dtype = np.dtype(jnp.result_type(*kinds))
        leaves[ours] = names.from_tensors(shapes[ours], dtype, by_place, tensors.read)
    if keep_fp8 and not any(isinstance(leaf, LazyFp8) for leaf in leaves.values()):
        raise UserError(f"{path} has no weights in FP8 to keep so")
    return config, unflatten(leaves), notes


def _in_fp8(
    shape: tuple[int, ...], pieces: dict[tuple[int, ...], tuple[str, names.Part]], tensors: Tensors
) -> LazyFp8:
    part = next(iter(pieces.values()))[1]
    assert part.num_in_dims is not None, part
    # A tensor's scales lie as a weight of one input dim and one output dim does.
    blocks = [-(-size // BLOCK) for size in names.tensor_shape(part, shape)[::-1]]
    scale_pieces = {at: (name, p._replace(num_in_dims=1)) for at, (name, p) in pieces.items()}
    return LazyFp8(
        names.from_tensors(shape, np.dtype(ml_dtypes.float8_e4m3fn), pieces, tensors.read_values),
        names.from_tensors(
            (*shape[: len(part.at)], *blocks),
            np.dtype(np.float32),
            scale_pieces,
            tensors.read_scales,
        ),
        part.num_in_dims,
    )


def _without_absent_depths(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, list[str]]:
    """`transformers` keeps the depth in config.json and drops the weights."""
    first = f"model.layers.{config.num_hidden_layers}."
    depth = config.num_nextn_predict_layers
    if not depth or any(name.startswith(first) for name in tensors.shapes):
        return config, []
    note = (
        f"config.json has multi-token prediction of depth {depth}, the files have no weights of it"
    )
    return dataclasses.replace(config, num_nextn_predict_layers=0), [note]


def _our_shapes(config: ModelConfig) -> dict[names.Path, tuple[int, ...]]:
    trees = zip(("parameters", "router_bias"), abstract_weights(config, one_device()), strict=True)
    return {path: tuple(leaf.shape) for path, leaf in flatten(dict(trees)).items()}


def _compare(wanted: dict[str, Any], found: dict[str, Any], sentence: str) -> None:
    wrong = [
        f"{name} has shape {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    missing = [name for name in wanted if name not in found]
    left_over = [name for name in found if name not in wanted]
    texts = []
    if missing:
        texts.append(f"missing: {', '.join(missing)}")
    if left_over:
        texts.append(f"left over: {', '.join(left_over)}")
    if wrong:
        texts.append("; ".join(wrong))
    if texts:
        raise UserError(f"{sentence}: {'; '.join(texts)}")


def write_folder(
    path: Path,
    config: ModelConfig,
    weights: Tree,
    dtype: str,
    advance: Callable[[int], None] = lambda _: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors; the folder appears at `path` only once it is whole.

    Args:
      weights: {"parameters": ..., "router_bias": ...} of `Lazy`, read one tensor at a time.
      dtype: see `save`.
      advance: told of every tensor's bytes as they are read.
      shard_bytes: largest file; one is held in memory.
    """
    raw = families.to_huggingface(config, "float32" if dtype == "float32" else "bfloat16")
    if dtype == "float8":
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
    arrays = flatten(weights)
    found = names.parts(config)
    # The public form of multi-token prediction repeats the shared weights; a tied head does not.
    found |= {
        name: found[of] for name, of in names.repeated(config).items() if name != "lm_head.weight"
    }
    new = path.with_name(path.name + ".partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    try:
        _write_tensors(new, found, arrays, dtype, advance, shard_bytes)
    except UserError:
        shutil.rmtree(new)
        raise
    new.rename(path)


def _write_tensors(
    folder: Path,
    found: dict[str, names.Part],
    arrays: dict[names.Path, Lazy],
    dtype: str,
    advance: Callable[[int], None],
    shard_bytes: int,
) -> None:
    shards = list(_shards(found, arrays, dtype, shard_bytes))
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for name in shard:
            value = names.to_tensor(found[name], arrays[found[name].path])
            tensors |= _stored(name, found[name], value, dtype)
            advance(value.nbytes)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(value.nbytes for value in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(
    found: dict[str, names.Part], arrays: dict[names.Path, Lazy], dtype: str, limit: int
) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    itemsize = {"float32": 4, "bfloat16": 2, "float8": 2}[dtype]
    shard, size = [], 0
    for name, part in found.items():
        nbytes = math.prod(names.tensor_shape(part, arrays[part.path].shape)) * itemsize
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    yield shard


def _stored(name: str, part: names.Part, value: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """What stands in the file for one tensor."""
    if part.path[0] == "router_bias":
        return {name: value.astype(np.float32)}
    if dtype == "float8" and part.is_linear:
        values, scale = quantized(value.astype(np.float32))
        stored = {name: values, name + SCALE: scale}
    else:
        stored = {name: value.astype(jnp.float32 if dtype == "float32" else jnp.bfloat16)}
    # The library writes memory as it lies, and a transposed view lies transposed.
    return {name: np.ascontiguousarray(value) for name, value in stored.items()}
