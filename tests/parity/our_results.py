"""A checkpoint folder run by moe_jax, with results under public tensor names."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from families import Tensors, stored, write
from flax import nnx
from safetensors.numpy import load_file

from moe_jax.interop import huggingface
from moe_jax.models.language_model import LanguageModel
from moe_jax.ops.balance import batch_losses
from moe_jax.ops.cross_entropy import cross_entropy


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int) -> None:
    """The model of families.py as it is published, FP8 codes as such."""
    plain, codes = stored(config, seed)
    write(folder, config, plain | {k: v.view(ml_dtypes.float8_e4m3fn) for k, v in codes.items()})


def loss_and_gradients(
    model: LanguageModel, tokens: np.ndarray, balance_weight: float
) -> tuple[float, float, Any]:
    """The mean loss over next tokens, Mixtral's balance loss, the gradient of loss + weight * it.

    The gradient is a tree like `model.parameters`.
    """
    rows, length = tokens.shape
    moe = dataclasses.replace(model.config.moe, mixtral_loss_weight=1.0)
    inputs = [np.ones_like(tokens), np.tile(np.arange(length), (rows, 1))]
    tokens, segment_ids, positions = (model.place(x) for x in (tokens, *inputs))

    def objective(parameters, router_bias):
        decoder = nnx.merge(model.graphdef, parameters, router_bias)
        hidden, stats = decoder.hidden_states(tokens, segment_ids, positions)
        weights = jnp.broadcast_to(positions < length - 1, tokens.shape).astype(jnp.float32)
        targets = jnp.roll(tokens, -1, axis=1)
        loss = cross_entropy(decoder.logits(hidden), targets, weights) / (rows * (length - 1))
        balance = jnp.zeros(())
        if balance_weight:
            count = jnp.int32(rows * length)
            balance = batch_losses(stats.load_E, stats.share_E, stats.z, count, moe)["mixtral_loss"]
        return loss + balance_weight * balance, (loss, balance)

    with jax.set_mesh(model.mesh):
        gradient = jax.jit(
            jax.grad(objective, has_aux=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        gradients, (loss, balance) = gradient(model.parameters, model.router_bias)
    return float(loss), float(balance), gradients


def by_public_name(model: LanguageModel, gradients: Any, folder: Path) -> Tensors:
    """A tree like `model.parameters`, exported as if it were weights and read again."""
    holder = LanguageModel(model.config, model.precision, model.mesh, gradients, model.router_bias)
    huggingface.save(holder, folder)
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def packed(tokens: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows of three documents and padding, made of the beginnings of the rows of `tokens`.

    Returns:
      tokens, positions, segment ids, and the row of `tokens` that each document is from.
    """
    rows, length = tokens.shape
    lengths = [2 * length // 5, length // 5, length - 2 * length // 5 - length // 5 - 3]
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(3, int)])
    segment_ids = np.repeat([1, 2, 3, 0], [*lengths, 3])
    source = (np.arange(rows)[:, None] + segment_ids) % rows
    everywhere = (np.tile(x, (rows, 1)) for x in (positions, segment_ids))
    return tokens[source, positions], *everywhere, source
