"""The weights of a checkpoint of either kind, on a mesh."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.config import WEIGHTLESS, ModelConfig, PrecisionConfig, UserError
from moe_jax.fields import differing, to_dict
from moe_jax.interop.huggingface import place_weights, read_folder
from moe_jax.interop.lazy import Tree
from moe_jax.interop.orbax_files import find_checkpoint, read_checkpoint
from moe_jax.models.language_model import LanguageModel

# Fields of the model in which a checkpoint and a run may differ without a word: they are of
# training, or of no weight. The depth of multi-token prediction is compared by itself.
FREE = {
    *("initializer", "initializer_range", "max_position_embeddings", "num_nextn_predict_layers"),
    *WEIGHTLESS,
}


class Weights(NamedTuple):
    """A model's config, its parameters and router biases on the mesh, and notes for a person."""

    config: ModelConfig
    parameters: Tree
    router_bias: Tree
    notes: list[str]


def is_huggingface(path: Path) -> bool:
    """A folder with a config.json; a work directory has one too, and its checkpoints."""
    return (path / "config.json").is_file() and not (path / "checkpoints").is_dir()


def read_weights(path: Path, keep_fp8: bool = False) -> tuple[ModelConfig, Tree, list[str]]:
    """Config, weights as a tree of `Lazy`, and notes, of a checkpoint of either kind.

    Args:
      path: a Hugging Face folder, a work directory, its checkpoints, or one checkpoint.
      keep_fp8: see `huggingface.read_folder`.
    Raises:
      ValueError: it is none of these, or has no weights in FP8 to keep.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}")
    if is_huggingface(path):
        return read_folder(path, keep_fp8)
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise UserError(
            f"{path} holds no checkpoint: a Hugging Face folder has a config.json, and a work "
            "directory has checkpoints"
        )
    if keep_fp8:
        raise UserError(f"{checkpoint} has no weights in FP8 to keep so; a Hugging Face folder may")
    return *read_checkpoint(checkpoint), []


def load_weights(
    path: str | Path,
    config: ModelConfig | None,
    mesh: Mesh,
    dtype: Any = jnp.float32,
    *,
    decoding: bool = False,
    keep_fp8: bool = False,
) -> Weights:
    """Reads each device's part of a checkpoint of either kind.

    Args:
      path: see `read_weights`.
      config: of the model that takes the weights; None for the checkpoint's own.
      dtype: of the parameters in memory.
      decoding: see `abstract_weights`.
      keep_fp8: those that the checkpoint has in FP8 stay so.
    Raises:
      ValueError: `config` is of another model; all differing fields are listed.
    """
    stored, weights, notes = read_weights(Path(path), keep_fp8)
    if config is None:
        config = stored
    else:
        notes = notes + _check(stored, config, path)
    if not config.num_nextn_predict_layers:
        for tree in weights.values():
            tree.pop("mtp", None)
    return Weights(config, *place_weights(config, weights, mesh, dtype, decoding=decoding), notes)


def load_model(
    path: Path, config: ModelConfig, mesh: Mesh, dtype: str, *, keep_fp8: bool = False
) -> LanguageModel:
    """These weights as a model, whose products have operands of this dtype too."""
    weights = load_weights(path, config, mesh, dtype, decoding=True, keep_fp8=keep_fp8)
    precision = PrecisionConfig(compute_dtype=dtype)
    return LanguageModel(config, precision, mesh, weights.parameters, weights.router_bias)


def _check(stored: ModelConfig, config: ModelConfig, path: str | Path) -> list[str]:
    """What differs and may."""
    routed = config.first_k_dense_replace < config.num_hidden_layers
    fatal, notes = [], []
    for field, (before, now) in differing(to_dict(stored), to_dict(config)).items():
        name = field.removeprefix("config.")
        if name in FREE or (name.startswith("moe.") and not routed):
            continue
        if name.startswith("rope.") and name != "rope.interleaved":
            # Stretched in the course of training, or on purpose.
            notes.append(f"config.model.{name} is {now!r} here, and {before!r} there")
        else:
            fatal.append(f"config.model.{name}={now!r} is {before!r} there")
    depths = stored.num_nextn_predict_layers, config.num_nextn_predict_layers
    if depths[1] == 0 and depths[0]:
        notes.append(f"its {depths[0]} modules that predict ahead are left out")
    elif depths[0] != depths[1]:
        fatal.append(f"config.model.num_nextn_predict_layers={depths[1]} is {depths[0]} there")
    if fatal:
        raise UserError(f"{path} is of another model: {'; '.join(fatal)}")
    return notes
