"""The walk over programs compiled for machines that are not here (`pytest -m aot`)."""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.planning import topologies
from moe_jax.planning.compiled import Counts, Walk
from moe_jax.planning.machines import of_device_kind
from moe_jax.planning.overlap import overlaps

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed (the extra test-aot)",
    ),
]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    topologies.prepare()
    devices = np.array(topologies.devices("v5p:2x2x2"))
    return Mesh(devices.reshape(2, 4), ("fsdp", "expert"), axis_types=(AxisType.Explicit,) * 2)


def _compile(function: Callable, mesh: Mesh, *arguments: tuple[tuple[int, ...], P]) -> Walk:
    placed = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in arguments
    ]
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*placed)
        options = {"xla_tpu_enable_async_all_to_all": "true"}
        return Walk(lowered.compile(compiler_options=options).as_text())


TOKENS, DIM, HIDDEN, LAYERS = 1024, 512, 256, 3


def _experts(layers: Callable) -> Callable:
    """Sends rows along `expert`, applies one expert there, and brings results back."""

    def region(x, up, down):
        def layer(x, weights):
            up, down = (jax.lax.all_gather(w, "fsdp", axis=1, tiled=True)[0] for w in weights)
            sent = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
            y = jax.nn.silu(sent @ up) @ down
            return x + jax.lax.all_to_all(y, "expert", 0, 0, tiled=True), None

        return layers(layer, x, (up, down))

    rows, weights = P(("fsdp", "expert")), P(None, "expert", "fsdp")
    return jax.shard_map(region, in_specs=(rows, weights, weights), out_specs=rows)


def _scan(layer: Callable, x: Any, weights: Any) -> Any:
    return jax.lax.scan(layer, x, weights)[0]


def _straight(layer: Callable, x: Any, weights: Any) -> Any:
    for i in range(LAYERS):
        x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], weights))
    return x


@pytest.mark.parametrize("layers", [_scan, _straight])
def test_products_and_exchanges_on_tpu_by_hand(layers: Callable, mesh: Mesh) -> None:
    weights = P(None, "expert", "fsdp")
    walk = _compile(
        _experts(layers),
        mesh,
        ((8 * TOKENS, DIM), P(("fsdp", "expert"))),
        ((LAYERS, 4, DIM, HIDDEN), weights),
        ((LAYERS, 4, HIDDEN, DIM), weights),
    )
    counts: Counts = walk.counts()
    assert counts.operations == LAYERS * 2 * 2 * TOKENS * DIM * HIDDEN
    assert counts.collective_bytes("all-to-all") == LAYERS * 2 * TOKENS * DIM * 2 * 3 / 4
    assert counts.collective_bytes("all-gather") == LAYERS * 2 * DIM * HIDDEN * 2 / 2
    assert counts.loops == counts.not_counted == []
    machine = of_device_kind(mesh.devices.flat[0].device_kind)
    assert machine is not None
    found = overlaps(walk, machine)
    exchanges = [o for o in found if o.collective.kind == "all-to-all"]
    assert sum(o.collective.times for o in exchanges) == 2 * LAYERS
    assert math.isclose(
        sum(o.collective.bytes * o.collective.times for o in exchanges),
        counts.collective_bytes("all-to-all"),
    )


def test_batched_products_on_tpu_by_hand(mesh: Mesh) -> None:
    def gradients(x, weights):
        def loss(x, weights):
            return jnp.sum(jnp.einsum("bld,bdf->blf", x, weights).astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1))(x, weights)

    walk = _compile(gradients, mesh, ((4, 128, 64), P()), ((4, 64, 256), P()))
    assert walk.counts().operations == 3 * 2 * 4 * 128 * 64 * 256
