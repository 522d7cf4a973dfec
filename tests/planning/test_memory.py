"""Bytes of the state against arrays that are there, and kept ones against what JAX keeps."""

import dataclasses
import math
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled_steps import HELD, LENGTH, case_of, init, make_config
from flax import nnx

from benchmarks import compile_one
from benchmarks.rematerialization import residual_bytes
from moe_jax import sharding, validation
from moe_jax.config import Config, MeshConfig
from moe_jax.curriculum import main_stage
from moe_jax.models.block import policy_of
from moe_jax.planning import memory
from moe_jax.planning.case import Case
from moe_jax.planning.weights import Weight
from moe_jax.sharding import EXPERT_AXES
from moe_jax.training.step import make_model

CONFIGS = Path(validation.__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    "config",
    [
        HELD["tiny"],
        HELD["full"],
        make_config(1, 1, "full", depth=1, fsdp=1),
        make_config(1, 1, "full", depth=1, fsdp=8),
    ],
    ids=lambda config: f"{config.mesh.fsdp}x{config.mesh.expert}",
)
def test_the_state_is_what_a_run_holds_on_each_device(config: Config) -> None:
    held, averaged = init(config), config.optimizer.ema_decay > 0
    devices = case_of(config).devices

    def of_device(tree: Any) -> int:
        """Alike on all."""
        sizes = {
            sum(x.addressable_shards[i].data.nbytes for x in jax.tree.leaves(tree))
            for i in range(devices)
        }
        (size,) = sizes
        return size

    assert memory.state(case_of(config)) == {
        "parameters": of_device(held["parameters"]),
        "optimizer": of_device(held["optimizer"]),
        "moving average": of_device(held["ema"]) if averaged else 0,
        "router bias": of_device(held["router_bias"]),
    }


@pytest.mark.parametrize(
    ("name", "platform", "outer", "inner", "recipe"),
    [
        ("deepseek_v2_lite", "tpu", 1, 4, "none"),
        ("deepseek_v2_lite", "tpu", 1, 4, "fp8_block"),
        ("deepseek_v2_lite", "gpu", 2, 2, "none"),
        ("mixtral_8x7b", "cpu", 1, 1, "none"),
        ("tiny", "cpu", 2, 2, "none"),
        ("tiny", "cpu", 2, 2, "fp8_block"),
    ],
)
def test_layers_keep_what_jax_keeps(
    name: str, platform: str, outer: int, inner: int, recipe: str
) -> None:
    config = validation.parse(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]())
    devices = outer * inner
    length = main_stage(config).sequence_length
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(fsdp=1, expert_outer=outer, expert=inner),
        precision=dataclasses.replace(config.precision, recipe=recipe),
        training=dataclasses.replace(
            config.training, tokens_per_step=4 * devices * length, micro_batches=2
        ),
    )
    case = Case.of(config, devices, platform)
    mesh = sharding.abstract_mesh(case.sizes, platform)
    assert case.rows == 2

    def residual(policy: str) -> float:
        keep = policy_of(policy, config.precision)
        arguments = config.model, config.precision, mesh, 2 * devices, length
        return residual_bytes(*arguments, keep) / devices

    full = residual("full")
    for policy in ("latent", "minimal", "none"):
        beyond = memory.kept_by_layer(case, True, policy) - memory.kept_by_layer(case, True, "full")
        # What is not counted are places of rows, of which JAX 0.10 keeps more for TPU.
        assert residual(policy) - full == pytest.approx(beyond, rel=0.03)


def test_steps_compiled_for_clusters_take_about_what_is_planned() -> None:
    """The rows of docs/compiled.md: the state to its last printed digit, the rest roughly.

    docs/planning.md says how far off it is.
    """
    text = (CONFIGS.parent / "docs" / "compiled.md").read_text()
    header, *lines = [line.strip("| ").split(" | ") for line in text.splitlines() if " | " in line]
    rows = [
        dict(zip(header, line, strict=False)) for line in lines if " GiB | " in " | ".join(line)
    ]
    assert len(rows) >= 5
    for row in rows:
        axes = [part.split() for part in row["mesh"].split(" × ")]
        devices = math.prod(int(size) for _, size in axes)
        target, model, factor = row["target"], row["model"], float(row["factor"])
        config = compile_one.make_config(model, target, factor, devices)
        case = Case.of(config, devices, "gpu" if target.startswith("h100") else "tpu")
        # They were compiled when dense weights were split over `fsdp` alone.
        case = dataclasses.replace(case, weights=tuple(map(_without_experts, case.weights)))
        state, temporary = (float(n) for n in row["memory"].removesuffix(" GiB").split(" + "))
        planned = sum(memory.state(case).values()) / 2**30
        assert planned == pytest.approx(state, abs=0.051), row
        besides = sum(memory.memory(case).values()) / 2**30 - planned
        assert 0.7 < temporary / besides < 1.35, (row, besides)


def _without_experts(weight: Weight) -> Weight:
    if weight.group == "routed":
        return weight
    axes = tuple(tuple(a for a in dim if a not in EXPERT_AXES) for dim in weight.axes)
    return weight._replace(axes=axes)


def test_the_whole_model_keeps_what_jax_keeps() -> None:
    """Layers of both kinds and modules that predict ahead, on a mesh that moves embeddings."""

    def config_of(policy: str) -> Config:
        return make_config(2, 1, policy, depth=2, fsdp=2, expert=4)

    def residuals(policy: str) -> float:
        config = config_of(policy)
        mesh = sharding.abstract_mesh(case_of(config).sizes)
        with jax.sharding.use_abstract_mesh(mesh):
            graphdef, parameters, rest = nnx.split(
                nnx.eval_shape(lambda: make_model(config)), nnx.Param, ...
            )
            split = jax.NamedSharding(mesh, sharding.BATCH)
            ids = jax.ShapeDtypeStruct((2 * 8, LENGTH), jnp.int32, sharding=split)

            def states(parameters, rest, ids):
                model = nnx.merge(graphdef, parameters, rest)
                hidden, _ = model.hidden_states(ids, ids, ids, training=True)
                return hidden, model.predict_ahead(hidden, ids, ids, ids, training=True).hidden_KBLD

            def kept(parameters, rest, ids):
                return jax.vjp(lambda p: states(p, rest, ids), parameters)[1]

            leaves = jax.tree.leaves(jax.eval_shape(kept, parameters, rest, ids))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 8

    for policy in ("latent", "minimal", "none"):
        here, full = (memory.kept_activations(case_of(config_of(p))) for p in (policy, "full"))
        assert residuals(policy) - residuals("full") == pytest.approx(here - full, rel=0.03), policy
