"""Attention's kernels compiled for machines that are not here, at DeepSeek-V3's head dims."""

import functools

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import MeshConfig
from moe_jax.ops.attention import attention
from moe_jax.planning import topologies
from moe_jax.sharding import BATCH, BATCH_AXES, P, make_mesh

pytestmark = pytest.mark.aot

LAYERS, LENGTH, HEADS, QK, V = 2, 4096, 128, 192, 128
KERNELS = "attention_forward", "attention_backward_dq", "attention_backward_dkv"
MACHINES = {"v5p:2x2x1": "tpu", "v6e:2x2": "tpu", "tpu7x:2x2x1": "tpu", "h100:1x8": "gpu"}
PLUGINS = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda13"}


def _compile(machine: str):
    """Gradients of a stack of layers that keep what attention makes, one row a device."""
    backend = MACHINES[machine]
    pytest.importorskip(PLUGINS[backend], reason=f"{PLUGINS[backend]} compiles for {machine}")
    topologies.prepare()
    mesh = make_mesh(MeshConfig(fsdp=-1, expert=2), topologies.devices(machine))
    policy = jax.checkpoint_policies.save_only_these_names("attention")

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(total, inputs):
        values = attention(*inputs, QK**-0.5, backend)
        return total + jnp.sum(values.astype(jnp.float32)), None

    def loss(q, k, v, ids):
        return jax.lax.scan(lambda total, x: layer(total, (*x, ids)), 0.0, (q, k, v))[0]

    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, P(None, BATCH_AXES))
        inputs = [
            jax.ShapeDtypeStruct((LAYERS, mesh.size, LENGTH, *size), jnp.bfloat16, sharding=rows)
            for size in ((HEADS, QK), (HEADS, QK), (HEADS, V))
        ]
        ids = jax.ShapeDtypeStruct(
            (mesh.size, LENGTH), jnp.int32, sharding=jax.NamedSharding(mesh, BATCH)
        )
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs, ids).compile()


# It goes with JAX 0.13 at the earliest, which this project does not take yet.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("machine", MACHINES)
def test_kernels_compile_and_memory_is_linear(machine: str) -> None:
    compiled = _compile(machine)
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if " custom-call(" in line]
    # Each once: what the forward pass made is kept and not made again.
    assert [sum(name in line for line in calls) for name in KERNELS] == [1, 1, 1]
    assert f"{LENGTH},{LENGTH}]" not in text
    # All heads' scores in float32 would be 8 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < HEADS * LENGTH * LENGTH * 4 / 2
