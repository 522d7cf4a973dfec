"""What a run tries on its own devices before it trusts them with a training step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.config import Config, UserError
from moe_jax.ops import dispatch
from moe_jax.ops.backends import Backends, choose
from moe_jax.ops.grouped_matmul import Experts
from moe_jax.sharding import BATCH, BATCH_AXES, EXPERT_AXES, P

Draw = Callable[[np.random.Generator], np.ndarray]
TOKENS, TOP_K, DIM, HIDDEN = 64, 4, 256, 128  # of a device
LOCAL_EXPERTS = 4
# Rows are the same in both forms, and only sums of many lie in another order.
TOLERANCE = 1e-2


def check_exchange(config: Config) -> list[str]:
    """Compares the ragged exchange's gradients on the current mesh with those of the padded one.

    XLA's one-shot kernels for ragged all-to-all on GPU are reported to have corrupted gradients
    over eight devices.

    Returns:
      A line for a person; none where nothing ragged is in use.
    Raises:
      UserError: they differ, or a back end is wanted that cannot take the model.
    """
    dtype = jnp.dtype(config.precision.compute_dtype)
    backends = choose(config.model, dtype)
    shards = sharding.num_shards(dict(jax.sharding.get_abstract_mesh().shape), EXPERT_AXES)
    model = config.model
    routed = model.first_k_dense_replace < model.num_hidden_layers
    if shards == 1 or not routed or backends.exchange != "ragged":
        return []
    difference = largest_difference(shards * LOCAL_EXPERTS, backends.grouped_matmul, dtype)
    # NaN is no agreement.
    if not difference <= TOLERANCE:
        raise UserError(
            "the ragged exchange of tokens is wrong on these devices: a gradient differs from that "
            f"of the padded exchange by {difference:.2g} of its largest value; set "
            "config.model.backends.exchange=padded"
        )
    return [f"exchange    ragged; its gradients equal the padded one's within {difference:.1e}"]


def largest_difference(num_experts: int, products: str, dtype: jnp.dtype) -> float:
    """By how much any gradient differs, as a share of the largest value of the padded one's."""
    first = np.random.default_rng(0).permutation(num_experts)[:TOP_K]

    def draw_ids(rng: np.random.Generator) -> np.ndarray:
        ids_TK = np.stack([rng.permutation(num_experts)[:TOP_K] for _ in range(TOKENS)])
        ids_TK[::2] = first  # every other token goes where the first does, so that buffers overflow
        return ids_TK

    def normal(scale: float, *shape: int) -> Draw:
        return lambda rng: rng.normal(scale=scale, size=shape).astype(dtype)

    draws = (
        normal(1.0, TOKENS, DIM),
        lambda rng: rng.uniform(0.2, 1.0, (TOKENS, TOP_K)),
        draw_ids,
        normal(DIM**-0.5, LOCAL_EXPERTS, DIM, 2 * HIDDEN),
        normal(HIDDEN**-0.5, LOCAL_EXPERTS, HIDDEN, DIM),
    )
    types = (dtype, jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    specs = (BATCH, BATCH, BATCH, P(EXPERT_AXES), P(EXPERT_AXES))
    compare = jax.jit(functools.partial(_difference, products=products, specs=specs))
    return float(compare(*map(_place, draws, types, specs)))


def _place(draw: Draw, dtype: jnp.dtype, spec: P) -> jax.Array:
    """An array of one drawn part a shard. A process draws what its own devices hold and no more."""
    mesh = jax.sharding.get_mesh()
    rows, *dims = draw(np.random.default_rng(0)).shape
    shape = (rows * sharding.num_shards(dict(mesh.shape), sharding.split_axes(spec, 0)), *dims)

    def part(index: Any) -> np.ndarray:
        return draw(np.random.default_rng((index[0].start or 0) // rows)).astype(dtype)

    return jax.make_array_from_callback(shape, jax.NamedSharding(mesh, spec), part)


def _difference(x, weights, ids, gate_up, down, *, products, specs):
    def region(exchange, x, weights, ids, *experts):
        others = tuple(axis for axis in BATCH_AXES if axis not in EXPERT_AXES)
        return dispatch.apply_experts(
            x,
            weights,
            ids,
            Experts(*(jax.lax.pcast(w, others, to="varying") for w in experts)),
            dispatch.Balanced(TOKENS, TOP_K, len(gate_up), 1.0),
            axes=EXPERT_AXES,
            all_axes=BATCH_AXES,
            combine_dtype=jnp.dtype(jnp.float32),
            backends=Backends(exchange=exchange, grouped_matmul=products),
        )[0]

    def gradients(exchange):
        apply = jax.shard_map(functools.partial(region, exchange), in_specs=specs, out_specs=BATCH)
        return jax.grad(
            lambda x, weights, *experts: jnp.sum(jnp.sin(apply(x, weights, ids, *experts))),
            argnums=(0, 1, 2, 3),
        )(x, weights, gate_up, down)

    def differ(ragged, padded):
        ragged, padded = ragged.astype(jnp.float32), padded.astype(jnp.float32)
        return jnp.max(jnp.abs(ragged - padded)) / jnp.max(jnp.abs(padded))

    each = map(differ, gradients("ragged"), gradients("padded"))
    return jnp.max(jnp.stack(list(each)))
