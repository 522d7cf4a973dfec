"""Redundant experts: replicas of those with much load, where devices have slots to spare.

DeepSeek-V3 serves with them (section 3.4). The load that fills the table is measured on prompts;
`ops/placement.py` fills it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import sharding
from moe_jax.config import ModelConfig, UserError
from moe_jax.models.language_model import LanguageModel
from moe_jax.ops.placement import device_loads, place
from moe_jax.sharding import EXPERT_AXES, P


def check_redundancy(redundant: int, config: ModelConfig, devices: int) -> None:
    """Raises:
    ValueError: a model on a mesh that splits experts over so many devices cannot have as many
      redundant ones.
    """
    given, experts = f"--redundant_experts={redundant}", config.moe.num_experts
    slots, most = experts + redundant, experts * (devices - 1)
    if redundant < 0:
        raise UserError(f"{given} must be at least 0")
    if not redundant:
        return
    if config.first_k_dense_replace == config.num_hidden_layers:
        raise UserError(f"{given} needs a model with routed experts, and this one has none")
    if redundant > most:
        raise UserError(
            f"{given} exceeds {most}, with all {experts} experts on every device that --mesh "
            f"splits them over ({devices})"
        )
    if slots % devices:
        raise UserError(
            f"{given} and the model's {experts} experts are {slots}, which do not divide over the "
            f"{devices} devices that --mesh splits experts over; "
            f"try --redundant_experts={redundant + -slots % devices}"
        )


def measure_load(model: LanguageModel, prompts: Sequence[np.ndarray]) -> np.ndarray:
    """[layers, experts] int32: tokens of prompts that chose each expert, by routed layer."""

    @jax.jit
    def load(weights, tokens_BL, lengths_B):
        positions_BL = jnp.zeros_like(tokens_BL) + jnp.arange(tokens_BL.shape[1])
        segment_ids_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
        decoder = nnx.merge(model.graphdef, *weights)
        return decoder.hidden_states(tokens_BL, segment_ids_BL, positions_BL)[1].load_E

    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.stack([np.pad(prompt, (0, lengths.max() - len(prompt))) for prompt in prompts])
    with jax.set_mesh(model.mesh):
        return np.asarray(load(model.weights, model.place(tokens), model.place(lengths)))


def with_redundant_experts(
    model: LanguageModel, load_LE: np.ndarray, redundant: int
) -> tuple[LanguageModel, str]:
    """The model with so many more experts in each routed layer, placed by load.

    It shares all other weights with `model`. While they are copied, a weight of one layer's experts
    is whole on every device, save for what `fsdp` splits. Modules of multi-token prediction stay as
    they are.

    Args:
      model: without redundant experts.
      load_LE: [layers, experts], of `measure_load`.
      redundant: see `check_redundancy`.
    Returns:
      The model; a line for a person on what load of the fullest device to expect.
    """
    assert not model.placement
    devices = sharding.num_shards(dict(model.mesh.shape), EXPERT_AXES)
    check_redundancy(redundant, model.config, devices)
    layers, experts = load_LE.shape
    placement = place(load_LE, devices, (experts + redundant) // devices)

    with jax.set_mesh(model.mesh):
        blocks = model.parameters["moe_blocks"]
        copied = {
            name: _copy(blocks["moe"][name], placement.expert_of_slot_LS)
            for name in ("gate", "up", "down")
        }
        parameters = {**model.parameters, "moe_blocks": {**blocks, "moe": blocks["moe"] | copied}}
        slots_LER = jax.device_put(
            placement.slots_of_expert_LER, jax.NamedSharding(model.mesh, P())
        )
    tables = np.tile(np.arange(experts), (layers, 1)), placement.expert_of_slot_LS
    before, after = (_fullest(table_LS, load_LE, devices) for table_LS in tables)
    line = f"experts     {experts}, and {redundant} redundant: fullest device {after:.2f}x the mean"
    line += f" by the prompts' load, {before:.2f}x without"
    balanced = LanguageModel(
        model.config, model.precision, model.mesh, parameters, model.router_bias, slots_LER
    )
    return balanced, line


@jax.jit
def _copy(weight: jax.Array, expert_of_slot_LS: jax.Array) -> jax.Array:
    """[layers, experts, ...] to [layers, slots, ...], split in the same way."""
    spec = P(*jax.typeof(weight).sharding.spec[1:])
    return jax.lax.map(
        lambda layer: layer[0].at[layer[1]].get(out_sharding=spec), (weight, expert_of_slot_LS)
    )


def _fullest(table_LS: np.ndarray, load_LE: np.ndarray, devices: int) -> float:
    """The load of the fullest device over the mean, both summed over layers."""
    load_LD = device_loads(table_LS, load_LE, devices)
    return float(load_LD.max(axis=1).sum() / load_LD.mean(axis=1).sum())
