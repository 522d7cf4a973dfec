"""Products with stacked weights, compiled for a TPU that is not here (`pytest -m aot`)."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import MeshConfig
from moe_jax.ops.weight_product import weight_product
from moe_jax.planning import topologies
from moe_jax.sharding import BATCH, P, make_mesh

pytestmark = pytest.mark.aot

LAYERS, ROWS, DIM = 8, 1024, 512


def test_no_layer_but_the_present_one_has_its_weight_narrowed() -> None:
    pytest.importorskip("libtpu", reason="libtpu compiles for v5p")
    topologies.prepare()
    mesh = make_mesh(MeshConfig(fsdp=-1), topologies.devices("v5p:2x2x1"))

    @jax.checkpoint
    def layer(x, weight):
        return jnp.tanh(weight_product(x, weight, 1, jnp.dtype(jnp.bfloat16))), None

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32))

    with jax.set_mesh(mesh):
        split, rows = P(None, "fsdp", None), BATCH
        weights = jax.ShapeDtypeStruct(
            (LAYERS, DIM, DIM), jnp.float32, sharding=jax.NamedSharding(mesh, split)
        )
        x = jax.ShapeDtypeStruct((ROWS, DIM), jnp.bfloat16, sharding=jax.NamedSharding(mesh, rows))
        text = jax.jit(jax.grad(loss)).lower(weights, x).compile().as_text()
    assert f"f32[{LAYERS},{DIM // mesh.size},{DIM}]" in text
    assert f"bf16[{LAYERS},{DIM // mesh.size},{DIM}]" not in text
