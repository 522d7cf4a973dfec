"""A part of `benchmarks.gpu`: a train step shaped as DeepSeek-V2-Lite's, of a few layers."""

import json
import runpy
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contender import ROOT
from benchmarks.gpu_products import matrix_rate
from benchmarks.gpu_shapes import STEPS, Step
from benchmarks.timing import median_seconds
from moe_jax import config as configs
from moe_jax import sharding, validation
from moe_jax.ops import routing
from moe_jax.planning.machines import peak_operations
from moe_jax.planning.operations import count_parameters, training_operations
from moe_jax.schedules import scheduled
from moe_jax.training import step


def make_config(shape: Step, *, small: bool, **backends: str) -> configs.Config:
    """V2-Lite, or its `small` sizes, with so many layers, for one device."""
    family = runpy.run_path(str(ROOT / "configs" / "deepseek_v2_lite.py"))
    raw = family["get_config"]("tiny" if small else "full")
    raw.mesh = configs.default_config().mesh
    raw.model.num_hidden_layers = shape.layers
    raw.model.backends.update(backends)
    raw.data.num_streams = shape.rows
    raw.data.stages = ({"sequence_length": shape.length},)
    raw.training.num_steps = 1
    raw.training.tokens_per_step = shape.rows * shape.length
    raw.training.micro_batches = 1
    raw.training.rematerialization = "none"
    return validation.parse(raw)


class TrainStep:
    """A compiled step with its state and a batch of random tokens."""

    def __init__(self, config: configs.Config):
        model, length = config.model, config.data.stages[0].sequence_length
        rows = config.training.tokens_per_step // length
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, rows, length + 1))
        batch = {
            "tokens": tokens[..., :-1].astype(np.int32),
            "targets": tokens[..., 1:].astype(np.int32),
            "segment_ids": np.ones((1, rows, length), np.int32),
            "positions": np.tile(np.arange(length, dtype=np.int32), (1, rows, 1)),
            "loss_weights": np.ones((1, rows, length), np.float32),
        }
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            self.state = jax.jit(lambda: step.init_state(config))()
            self.batch = jax.device_put(batch, sharding.batch_sharding(mesh))
            self.scheduled = scheduled(config, 0)
            lowered = jax.jit(step.make_train_step(config), donate_argnums=0).lower(
                self.state, self.batch, self.scheduled
            )
        self.compiled = lowered.compile()
        count = count_parameters(self.state["parameters"], self.state["router_bias"], model)
        self.operations = training_operations(model, count, length) * rows * length

    def run(self):
        self.state, metrics = self.compiled(self.state, self.batch, self.scheduled)
        return self.state, metrics


def forced_route(scores_TE, bias_E, config):
    """`routing.route` with balance forced: choice k of token t is expert (t * K + k) mod E."""
    tokens, top_k = len(scores_TE), config.num_experts_per_tok
    ids_TK = jnp.arange(tokens * top_k, dtype=jnp.int32).reshape(tokens, top_k) % config.num_experts
    return routing.Routing(ids_TK, jnp.take_along_axis(scores_TE, ids_TK, axis=1))


def main() -> None:
    quick = "quick" in sys.argv[1:]
    shape = STEPS[quick]
    config = make_config(shape, small=quick)
    seconds, operations = {}, 0.0
    routes = {"balance forced": forced_route, "real (the router's)": routing.route}
    for name, route in routes.items():
        with mock.patch.object(routing, "route", route):
            train_step = TrainStep(config)
        operations = train_step.operations
        # All of a step's results come at once.
        run = lambda train_step=train_step: train_step.run()[1]["loss"]  # noqa: E731
        seconds[name] = median_seconds(run, jax.block_until_ready, calls=3)
        del train_step, run  # the next one needs its memory
    peak, _ = peak_operations(jax.devices()[:1], jnp.dtype(jnp.bfloat16))
    print(
        json.dumps(
            {
                "shape": shape._asdict(),
                "operations": operations,
                "tokens": shape.rows * shape.length,
                "peak": peak,
                "rate": matrix_rate(quick),
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
