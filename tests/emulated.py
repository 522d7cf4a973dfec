"""What tests share: meshes of emulated devices, random arrays on them, quick compilation."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import sharding
from moe_jax.config import MeshConfig, ModelConfig, PrecisionConfig
from moe_jax.ops.rope import rotary_angles

# Compiling is most of the time of the tests, so it is kept cheap.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
    """Over as many of the emulated devices as the sizes multiply to; one without any."""
    devices = jax.devices()[: math.prod(sizes.values())]
    return sharding.make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), devices)


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all` as its documentation has it; XLA has none on CPU.

    Sizes that disagree between sender and receiver give NaN, or the largest integer.
    """
    whole = jnp.issubdtype(operand.dtype, jnp.integer)
    nothing = jnp.iinfo(operand.dtype).max if whole else jnp.nan
    here = jax.lax.axis_index(axis_name)
    sent = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    place = jnp.arange(len(output))
    for source, (rows, starts, sizes, targets) in enumerate(zip(*sent, strict=True)):
        number = place - targets[here]
        inside = (number >= 0) & (number < sizes[here])
        taken = rows.at[starts[here] + number].get(mode="fill", fill_value=nothing)
        taken = jnp.where(sizes[here] == recv_sizes[source], taken, nothing)
        output = jnp.where(inside.reshape(-1, *[1] * (output.ndim - 1)), taken, output)
    return output


def place(
    mesh: jax.sharding.Mesh, shapes: Any, draw: Callable[[tuple[int, ...]], np.ndarray]
) -> Any:
    """Float32 arrays of `draw(shape)`, split as `shapes`, a tree of abstract arrays, says."""
    return jax.tree.map(
        lambda x: jax.device_put(
            draw(x.shape).astype(np.float32), jax.NamedSharding(mesh, x.sharding.spec)
        ),
        shapes,
    )


def run_attention(
    layer_class: Any,
    config: ModelConfig,
    sizes: dict[str, int],
    segment_ids: np.ndarray,
    positions: np.ndarray,
    rotary_dim: int,
) -> tuple[np.ndarray, jax.Array, dict[str, np.ndarray]]:
    """An attention layer with random weights: its input, its result and its weights in float64."""
    rng, mesh = np.random.default_rng(0), make_mesh(**sizes)
    precision = PrecisionConfig(compute_dtype="float32")
    with jax.set_mesh(mesh):
        layer = nnx.eval_shape(lambda: layer_class(config, precision, rngs=nnx.Rngs(0)))
        graphdef, shapes = nnx.split(layer)
        state = place(mesh, nnx.to_pure_dict(shapes), lambda shape: rng.uniform(-1, 1, shape))
        x = rng.normal(size=(*positions.shape, config.hidden_size)).astype(np.float32)
        rows = jax.NamedSharding(mesh, sharding.BATCH)
        inputs = jax.device_put((x, segment_ids, positions), rows)

        @jax.jit
        def run(state, x, segment_ids, positions):
            rotary = rotary_angles(positions, rotary_dim, config.rope)
            return nnx.merge(graphdef, state)(x, segment_ids, rotary)

        y = run(state, *inputs)
    weights = {
        name: np.asarray(next(iter(entry.values())), np.float64) for name, entry in state.items()
    }
    return x, y, weights
