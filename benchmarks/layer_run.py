"""One contender of `benchmarks.moe_layer`: the routed layer, forward and backward.

A turn's argument is a routing:

  forced: balance is forced: choice k of token t is expert (t * K + k) mod E. Choices of a token are
    neighbours, so it travels to fewer devices than with a router of its own.
  real: what a random router chooses for random tokens.
  one_expert: every token chooses expert 0; its other choices are random.
  zipf: an expert's chance falls as 1 / rank.
  one_device: every token chooses among one device's experts alone.

No hook in the layer does so. The router's columns are orthonormal, so tokens can be made that have
the wanted logits, and all routings are runs of one compiled program.

Shapes: T tokens, E experts, K choices, D model dim, F hidden dim of an expert.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.contender import serve
from benchmarks.shape import SHAPE
from moe_jax import config as configs
from moe_jax import sharding
from moe_jax.layers.moe import MoE
from moe_jax.ops import dispatch, grouped_matmul, routing
from moe_jax.ops.grouped_matmul import Experts

ROWS, LENGTH = 32, 512
TOKENS = ROWS * LENGTH
DIM, HIDDEN, TOP_K = SHAPE["dim"], SHAPE["expert_ffn"], SHAPE["top_k"]
ROUTINGS = ("forced", "real", "one_expert", "zipf", "one_device")


def model_config(experts: int, buffer_factor: float) -> configs.ModelConfig:
    moe = configs.MoEConfig(
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        num_shared_experts=0,
        intermediate_size=HIDDEN,
        topk_method="greedy",
        num_expert_groups=1,
        num_limited_groups=1,
        buffer_factor=buffer_factor,
    )
    return configs.ModelConfig(hidden_size=DIM, moe=moe)


def wanted_logits(name: str, experts: int, of_a_device: int) -> np.ndarray:
    """[T, E]."""
    rng = np.random.default_rng(1)
    logits_TE, chosen = rng.normal(size=(TOKENS, experts)), 12.0
    if name == "forced":
        ids_TK = np.arange(TOKENS * TOP_K).reshape(TOKENS, TOP_K) % experts
        logits_TE[np.arange(TOKENS)[:, None], ids_TK] += chosen
    elif name == "one_expert":
        logits_TE[:, 0] += chosen
    elif name == "zipf":
        # The largest of log-chances with Gumbel noise are a draw without replacement.
        logits_TE = rng.gumbel(size=logits_TE.shape) - np.log(np.arange(1, experts + 1))
    elif name == "one_device":
        logits_TE[:, : max(of_a_device, TOP_K)] += chosen
    return logits_TE / 4  # where a sigmoid is not flat


def tokens_of(logits_TE: np.ndarray, router_DE: np.ndarray) -> np.ndarray:
    """[rows, length, D] float32, random but for the logits that the router gives them."""
    x_TD = np.random.default_rng(2).normal(size=(TOKENS, DIM))
    x_TD += (logits_TE - x_TD @ router_DE) @ router_DE.T
    return x_TD.astype(np.float32).reshape(ROWS, LENGTH, DIM)


def make_weights(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """Random float32 weights, the same on any mesh."""
    rng = np.random.default_rng(0)

    def place(shape):
        values = rng.normal(scale=shape.shape[-2] ** -0.5, size=shape.shape)
        if len(shape.shape) == 2:  # the router's
            values = np.linalg.qr(values)[0]
        split = jax.NamedSharding(mesh, shape.sharding.spec)
        return jax.device_put(values.astype(np.float32), split)

    return jax.tree.map(place, shapes)


def slots_run(ids_TK: np.ndarray, experts: int, fsdp: int, expert: int) -> list[int]:
    """Of each device, the rows of its grouped products if they run in one round."""
    here, tokens = experts // expert, TOKENS // fsdp
    size = grouped_matmul.tile_size(dispatch.Balanced(tokens, TOP_K, experts, 1.0).choices(1))
    tiles = jax.jit(lambda ids_TK: grouped_matmul.make_tiles(ids_TK, here, size).used)
    # Below 0 and from `here` on, an expert is another device's.
    return [
        int(tiles(of_devices_TK - first)) * size
        for of_devices_TK in ids_TK.reshape(fsdp, tokens, TOP_K)
        for first in range(0, experts, here)
    ]


def reference(weights: Any, x_BLD: jax.Array, config: configs.MoEConfig) -> jax.Array:
    """The layer as a dense loop over experts."""
    x_TD = x_BLD.reshape(-1, DIM)
    router_DE = weights["router"]["weight"]
    logits_TE = jnp.matmul(x_TD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
    chosen = routing.route(routing.affinities(logits_TE, config.scoring_func), None, config)
    experts = Experts(
        jnp.concatenate([weights["gate"], weights["up"]], axis=2).astype(x_BLD.dtype),
        weights["down"].astype(x_BLD.dtype),
    )
    y_TD = dispatch.experts_reference(x_TD, chosen.weights_TK, chosen.expert_ids_TK, experts)
    return y_TD.reshape(x_BLD.shape).astype(x_BLD.dtype)


def difference(found: Any, expected: Any) -> float:
    """The largest of any array, as a share of the largest value expected in it."""

    def of_array(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))

    return max(jax.tree.leaves(jax.tree.map(of_array, found, expected)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--fsdp", type=int)
    parser.add_argument("--expert", type=int)
    parser.add_argument("--buffer_factor", type=float)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS)
    parser.add_argument("--check", action="store_true", help="against the reference")
    flags = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", flags.fsdp * flags.expert)
    mesh = sharding.make_mesh(configs.MeshConfig(fsdp=flags.fsdp, expert=flags.expert))
    rows = jax.NamedSharding(mesh, sharding.BATCH)
    model = model_config(flags.experts, flags.buffer_factor)
    of_a_device = flags.experts // flags.expert
    with jax.set_mesh(mesh):
        precision = configs.PrecisionConfig(compute_dtype=flags.dtype)
        layer = nnx.eval_shape(lambda: MoE(model, precision, rngs=nnx.Rngs(0)))
        graphdef, shapes = nnx.split(layer)
        weights = make_weights(nnx.to_pure_dict(shapes), mesh)
        router_DE = np.asarray(weights["router"]["weight"], np.float64)
        inputs = {}
        for name in flags.routings:
            x = tokens_of(wanted_logits(name, flags.experts, of_a_device), router_DE)
            inputs[name] = jax.device_put(x.astype(flags.dtype), rows)
        dy = np.random.default_rng(3).normal(size=(ROWS, LENGTH, DIM)).astype(flags.dtype)
        dy = jax.device_put(dy, rows)

        def step(weights, x, dy):
            def apply(weights, x):
                valid = jnp.ones_like(x[..., 0], dtype=bool)
                return nnx.merge(graphdef, weights)(x, valid, training=True)

            y, pull_back, stats = jax.vjp(apply, weights, x, has_aux=True)
            return y, pull_back(dy), (stats.rounds, stats.dropped)

        compiled = jax.jit(step).lower(weights, inputs["forced"], dy).compile()

        def run(name="forced"):
            return jax.block_until_ready(compiled(weights, inputs[name], dy))

        results = {name: run(name) for name in inputs}

    @jax.jit
    def expected(weights, x, dy):
        y, pull_back = jax.vjp(lambda weights, x: reference(weights, x, model.moe), weights, x)
        return y, pull_back(dy)

    facts = {}
    for name, (y, gradients, (rounds, dropped)) in results.items():
        host = jax.tree.map(np.asarray, (weights, inputs[name], dy))
        logits_TE = host[1].reshape(TOKENS, DIM).astype(np.float64) @ router_DE
        ids_TK = np.argsort(-logits_TE, axis=1)[:, :TOP_K]
        slots = slots_run(ids_TK, flags.experts, flags.fsdp, flags.expert)
        router = 6 * DIM * flags.experts * TOKENS // mesh.size
        facts[name] = {
            "operations": 18 * DIM * HIDDEN * max(slots) + router,
            "copies": float(np.mean([len(set(c)) for c in (ids_TK // of_a_device).tolist()])),
            "rounds": int(rounds),
            "dropped": int(dropped),
        }
        if flags.check:
            expected_y, expected_gradients = expected(*host)
            facts[name]["forward"] = difference(y, expected_y)
            facts[name]["gradient"] = difference(gradients, expected_gradients)
    tokens = TOKENS // mesh.size
    balanced = dispatch.Balanced(tokens, TOP_K, flags.experts, flags.buffer_factor)
    program = {
        "sent": flags.expert * balanced.rows(of_a_device) / tokens,
        "memory": compiled.memory_analysis().temp_size_in_bytes,
    }
    serve(run, {"program": program, "routings": facts})


if __name__ == "__main__":
    main()
