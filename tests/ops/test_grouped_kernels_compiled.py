"""The kernels compiled for TPUs that are not here, forward and backward (`pytest -m aot`)."""

import importlib.util
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.ops import grouped_matmul
from moe_jax.ops.backends import Backends
from moe_jax.ops.grouped_matmul import Experts
from moe_jax.planning import topologies

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
]

DEVICES, ROWS, TOP_K, EXPERTS = 4, 1024, 2, 4
TPU = Backends(grouped_matmul="tpu")


@pytest.fixture(autouse=True)
def _compile_without_a_tpu() -> None:
    topologies.prepare()


def _compiled(topology: str, dtype: str, dim: int, hidden: int) -> str:
    """The text of the gradient of experts in two scanned, rematerialized layers."""
    size = grouped_matmul.tile_size(ROWS * TOP_K / EXPERTS, TPU)
    num_tiles = ROWS * TOP_K // size + EXPERTS

    def region(x, weights, ids, experts):
        tiles = grouped_matmul.make_tiles(ids, EXPERTS, size)

        @jax.checkpoint
        def layer(x, experts):
            y = grouped_matmul.swiglu_experts(x, weights, experts, tiles, num_tiles, size, TPU)
            return x + y.astype(x.dtype), None

        return jax.lax.scan(layer, x, experts)[0]

    def loss(x, weights, ids, experts):
        mapped = jax.shard_map(
            region, in_specs=(P("data"), P("data"), P("data"), P(None, "data")), out_specs=P("data")
        )
        return jnp.sum(mapped(x, weights, ids, experts).astype(jnp.float32) ** 2)

    devices = topologies.devices(topology)
    mesh = Mesh(np.array(devices[:DEVICES]), ("data",), axis_types=(AxisType.Explicit,))

    def array(spec, dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        arguments = (
            array(P("data"), dtype, DEVICES * ROWS, dim),
            array(P("data"), "float32", DEVICES * ROWS, TOP_K),
            array(P("data"), "int32", DEVICES * ROWS, TOP_K),
            Experts(
                array(P(None, "data"), "float32", 2, DEVICES * EXPERTS, dim, 2 * hidden),
                array(P(None, "data"), "float32", 2, DEVICES * EXPERTS, hidden, dim),
            ),
        )
        return jax.jit(jax.grad(loss, argnums=(0, 1, 3))).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    "topology, dtype",
    [
        ("v5p:2x2x1", "bfloat16"),
        ("v6e:2x2", "bfloat16"),
        ("tpu7x:2x2x1", "bfloat16"),
        ("v6e:2x2", "float32"),
    ],
)
def test_program_holds_the_kernels_and_no_other_product(topology: str, dtype: str) -> None:
    text = _compiled(topology, dtype, 256, 384)
    names = re.findall(r'custom_call_target="tpu_custom_call".*?op_name="([^"]*)"', text)
    kernels = Counter(name.split("/")[-2] for name in names)
    # Forward: two products and a sum of slots. Backward: the first product again, two input
    # gradients, two weight gradients and a sum. Not even the sort computes in floats.
    assert kernels == {"grouped_matmul": 2 + 3, "grouped_matmul_weights": 1 + 3}
    assert not re.search(r"= (f32|bf16)\[\S* (dot|convolution|ragged-dot)\(", text)
