"""One row of `benchmarks.compiled_step`: arguments MODEL, TARGET and BUFFER_FACTOR.

Compiles the train step for devices that are not here, counts what one of them does, and prints it
as a line of JSON.
"""

import importlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import sharding, validation
from moe_jax.config import MESH_AXES, Config
from moe_jax.planning import compiled_step, topologies
from moe_jax.planning.communication import exchanged_rows
from moe_jax.planning.compiled import Collective, Counts
from moe_jax.planning.machines import of_device_kind
from moe_jax.planning.operations import count_parameters, training_operations
from moe_jax.planning.overlap import overlaps
from moe_jax.training import ahead_of_time

LENGTH = 4096
LENGTHS = {("deepseek_v3", "v6e:8x8"): 2048}  # the memory of a v6e chip holds no more
DENSE_LAYERS, ROUTED_LAYERS = 1, 2
# The mesh by model and target; the other devices are fsdp's. Each device has one row.
MESHES = {
    "deepseek_v2_lite": {
        "v5p:4x4x4": {"expert": 16},
        "v6e:8x8": {"expert": 8},
        "tpu7x:4x4x4": {"expert": 16},
        "h100:8x8": {"expert": 8},
    },
    "deepseek_v3": {
        "v5p:4x4x4": {"expert": 16},
        "v6e:8x8": {"expert": 16},
        "tpu7x:4x4x4": {"expert": 16},
        "h100:8x8": {"expert_outer": 8, "expert": 8},
    },
}


def make_config(model: str, target: str, buffer_factor: float, num_devices: int) -> Config:
    """The model's own sizes, at a small depth."""
    raw = importlib.import_module(f"configs.{model}").get_config()
    raw.model.num_hidden_layers = DENSE_LAYERS + ROUTED_LAYERS
    raw.model.first_k_dense_replace = DENSE_LAYERS
    raw.model.num_nextn_predict_layers = 0
    raw.model.moe.buffer_factor = buffer_factor
    raw.mesh.update({axis: 1 for axis in MESH_AXES} | {"fsdp": -1} | MESHES[model][target])
    raw.data.num_streams = num_devices
    length = LENGTHS.get((model, target), LENGTH)
    raw.data.stages = ({"sequence_length": length},)
    raw.training.num_steps = 1
    raw.training.tokens_per_step = num_devices * length
    raw.training.micro_batches = 1
    raw.training.rematerialization = "none"
    return validation.parse(raw)


def main() -> None:
    model, target, buffer_factor = sys.argv[1:4]
    ahead_of_time.prepare()
    devices = topologies.devices(target)
    config = make_config(model, target, float(buffer_factor), len(devices))
    step = ahead_of_time.compile_step(config, devices)
    if len(sys.argv) > 4:
        Path(sys.argv[4]).write_text(step.text)
    facts = {
        "device": devices[0].device_kind,
        "jax": jax.__version__,
        "mesh": {axis: size for axis, size in step.mesh.shape.items() if size > 1},
        "seconds": step.seconds,
        "state_bytes": step.state_bytes,
        "temporary_bytes": step.temporary_bytes,
    }
    print(json.dumps(facts | count(step, config)))


def count(step: compiled_step.CompiledStep, config: Config) -> dict:
    """What one device does, and what it would have to."""
    walk = compiled_step.walk(step, config)
    counts = walk.counts()
    machine = of_device_kind(step.mesh.devices.flat[0].device_kind)
    assert machine is not None
    parameters = count_parameters(step.state["parameters"], step.state["router_bias"], config.model)
    length = config.data.stages[-1].sequence_length
    needed = training_operations(config.model, parameters, length) * length
    exchanges = [c for c in counts.collectives if is_exchange(c)]
    of_exchanges = [
        o for o in overlaps(walk, machine) if is_exchange(o.collective) and o.collective.times
    ]
    largest = largest_part(step.state["parameters"])
    return {
        "operations": counts.operations,
        "needed_operations": needed,
        "exchange_bytes": sum(c.bytes * c.times for c in exchanges),
        "needed_exchange_bytes": needed_exchange(config, step.mesh),
        "exchange_seconds": sum(o.seconds * o.collective.times for o in of_exchanges),
        "hidden_seconds": sum(o.share * o.seconds * o.collective.times for o in of_exchanges),
        "collectives": [
            c._asdict() | {"unwanted": why_unwanted(c, largest)} for c in together(counts)
        ],
        "loops_not_counted": sorted(
            {short(loop.op_name) for loop in counts.loops if loop.trips is None and loop.times}
        ),
        "kernels_not_counted": sorted(set(counts.not_counted)),
    }


def needed_exchange(config: Config, mesh: jax.sharding.Mesh) -> float:
    """Bytes of one copy per destination, there and back, in a forward and a backward pass."""
    sizes = [mesh.shape[axis] for axis in sharding.EXPERT_AXES]
    rows = exchanged_rows(config.model.moe, config.data.stages[-1].sequence_length, sizes)
    precision = config.precision
    there, back = jnp.dtype(precision.compute_dtype), jnp.dtype(precision.combine_dtype)
    row = config.model.hidden_size * (there.itemsize + back.itemsize)
    return ROUTED_LAYERS * 2 * rows * row


def is_exchange(collective: Collective) -> bool:
    """Of tokens to their experts; the embedding's vectors travel in all-to-alls too."""
    return collective.kind.endswith("all-to-all") and not of_embedding(collective)


def of_embedding(collective: Collective) -> bool:
    return "embedding/" in collective.op_name


def largest_part(parameters: Any) -> int:
    """Bytes of the largest part of a parameter on one device."""
    return max(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(parameters)
    )


def why_unwanted(collective: Collective, largest: int) -> str:
    """What is wrong with a collective; "" if nothing."""
    if is_exchange(collective):
        return "" if "dispatch" in collective.op_name else "not of the dispatch"
    if collective.kind == "all-reduce":
        whole = collective.bytes / 2 / (1 - 1 / collective.group)
        return "of more than a parameter's part" if whole > largest else ""
    if collective.kind in ("all-gather", "reduce-scatter"):
        return ""  # of weights, and of their gradients
    wanted = of_embedding(collective) or collective.bytes < 2**20
    return "" if wanted else "nothing asks for it"


def together(counts: Counts) -> list[Collective]:
    """Alike ones as one, the largest first; those that never run are left out."""
    times: dict[Collective, float] = {}
    for collective in counts.collectives:
        key = collective._replace(times=0.0, op_name=short(collective.op_name))
        times[key] = times.get(key, 0.0) + collective.times
    found = [key._replace(times=value) for key, value in times.items() if value]
    return sorted(found, key=lambda c: -c.bytes * c.times)


def short(op_name: str) -> str:
    """Without what JAX wraps around the named scopes; of merged ones, each name once."""
    name = op_name.replace("transpose(", "backward(")
    noise = r"jit\(train_step\)|\b(while|body|eval_jaxpr|closed_call|checkpoint|shard_map|jvp)\b"
    name = re.sub(noise, "", name).replace("rematted_computation", "again")
    names = [re.sub(r"[()]+", " ", part) for part in name.split(":")]
    names = [re.sub(r"\s*/[\s/]*", "/", part).strip("/ ") for part in names]
    return ", ".join(dict.fromkeys(names))


if __name__ == "__main__":
    main()
