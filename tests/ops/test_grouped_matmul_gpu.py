"""The GPU's grouped products: interpreted on the CPU, lowered, and compiled for H100s."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from moe_jax.ops.grouped_matmul_gpu import TILE_SIZE, gmm, tgmm

EXPERTS, TILES = 3, 4
# Two steps of a sum; two blocks of columns, the second one's end outside.
DIM_A, DIM_B = 128, 320


@pytest.fixture(scope="module")
def interpreted():
    """gmm, gmm with transposed weights, and tgmm on the CPU, by two programs."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} cannot interpret kernels with transposed operands")
    options = {"interpret": plgpu.InterpretGPUParams(detect_races=True), "programs": 2}
    return (
        jax.jit(lambda *args: gmm(*args, **options)),
        jax.jit(lambda *args: gmm(*args, transpose_weights=True, **options)),
        jax.jit(lambda *args: tgmm(*args, EXPERTS, **options)),
    )


# Tiles of each expert: some empty, one that has all, none at all.
@pytest.mark.parametrize("tiles_of_expert", [(2, 0, 1), (0, 4, 0), (0, 0, 0)])
def test_products_are_those_of_each_tile_and_expert(interpreted, tiles_of_expert):
    forward, transposed, weights = interpreted
    used = sum(tiles_of_expert)
    expert_of_tile = np.full(TILES, EXPERTS - 1, np.int32)
    expert_of_tile[:used] = np.repeat(np.arange(EXPERTS), tiles_of_expert)
    rng = np.random.default_rng(0)
    # Whole numbers: sums are exact in whatever order.
    x_SA = rng.integers(-4, 5, (TILES * TILE_SIZE, DIM_A)).astype(np.float32)
    y_SB = rng.integers(-4, 5, (TILES * TILE_SIZE, DIM_B)).astype(np.float32)
    w_EAB = rng.integers(-4, 5, (EXPERTS, DIM_A, DIM_B)).astype(np.float32)
    live = used * TILE_SIZE
    want_SB, want_EAB = np.zeros_like(y_SB), np.zeros_like(w_EAB)
    for tile, expert in enumerate(expert_of_tile[:used]):
        rows = slice(tile * TILE_SIZE, (tile + 1) * TILE_SIZE)
        want_SB[rows] = x_SA[rows] @ w_EAB[expert]
        want_EAB[expert] += x_SA[rows].T @ y_SB[rows]
    x_SA[live:] = y_SB[live:] = np.nan

    x, y, w = (jnp.asarray(value, jnp.bfloat16) for value in (x_SA, y_SB, w_EAB))
    for got in (
        forward(x, w, expert_of_tile, jnp.int32(used)),
        transposed(x, w.swapaxes(1, 2), expert_of_tile, jnp.int32(used)),
    ):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got[:live], jnp.asarray(want_SB[:live], jnp.bfloat16))
    np.testing.assert_array_equal(weights(x, y, expert_of_tile, jnp.int32(used)), want_EAB)


def _trace(slots: int = TILES * TILE_SIZE, dim: int = 128, dtype: str = "bfloat16") -> None:
    shapes = ((slots, dim), dtype), ((EXPERTS, dim, 64), dtype), ((TILES,), "int32"), ((), "int32")
    jax.eval_shape(gmm, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))


def test_what_the_kernels_cannot_take_is_refused():
    with pytest.raises(ValueError, match="take bfloat16, not float32; 'portable' takes anything"):
        _trace(dtype="float32")
    with pytest.raises(ValueError, match=r"dims that are multiples of 64, not \[64, 96\]"):
        _trace(dim=96)
    device = jax.sharding.AbstractDevice("NVIDIA A100-SXM4-40GB", 108, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="not for NVIDIA A1"):
        _trace()
    with pytest.raises(AssertionError, match="256"):
        _trace(slots=TILES * 64)


@jax.custom_vjp
def product(x, w, expert_of_tile, used):
    return gmm(x, w, expert_of_tile, used)


def product_backward(kept, dy):
    x, w, *where = kept
    dx = gmm(dy, w, *where, transpose_weights=True)
    return dx, tgmm(x, dy, *where, len(w)).astype(w.dtype), None, None


product.defvjp(lambda *args: (product(*args), args), product_backward)


def training(mesh, dim):
    """A function as the routed layer uses the products, its arguments' shapes.

    It scans over rematerialized layers, each with a loop of more rounds of its own, inside one
    region of `mesh` that checks what varies.
    """

    def rounds(x, w, where):
        y = product(x, w, *where)
        # Its trip count is data, so it is the forward pass of the loop alone.
        more = jax.lax.fori_loop(
            0, where[1], lambda _, y: product(y, w, *where), jax.lax.stop_gradient(y)
        )
        return y + jax.lax.stop_gradient(more)

    def region(x, w_L, expert_of_tile, used):
        w_L = jax.lax.pcast(w_L, ("data",), to="varying")
        layer = jax.checkpoint(lambda x, w: (rounds(x, w, (expert_of_tile, used[0])), None))
        return jax.lax.scan(layer, x, w_L)[0]

    def loss(x, w_L, expert_of_tile, used):
        y = jax.shard_map(
            region, in_specs=(P("data"), P(), P("data"), P("data")), out_specs=P("data")
        )(x, w_L, expert_of_tile, used)
        return jnp.sum(y.astype(jnp.float32))

    def shape(dims, dtype, *spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, P(*spec)))

    devices = mesh.size
    shapes = (
        shape((devices * TILES * TILE_SIZE, dim), jnp.bfloat16, "data"),
        shape((2, EXPERTS, dim, dim), jnp.bfloat16),
        shape((devices * TILES,), jnp.int32, "data"),
        shape((devices,), jnp.int32, "data"),
    )
    return jax.jit(jax.grad(loss, argnums=(0, 1))), shapes


def test_kernels_are_lowered_inside_a_region_with_scan_loops_and_rematerialization():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        function, shapes = training(mesh, 128)
        text = function.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert text.count("@mosaic_gpu_v2") >= 3
    for name in ("grouped_matmul/", "grouped_matmul_weights/"):
        assert name in text


@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's plugin for CUDA is not installed (the extra cuda13)",
)
def test_kernels_compile_for_h100s():
    from moe_jax.planning import topologies

    topologies.prepare()
    devices = np.array(topologies.devices("h100:1x2"))
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        # Mosaic compiles its kernels while XLA compiles the program.
        function, shapes = training(mesh, 1408)
        text = function.lower(*shapes).compile().as_text()
    calls = [line for line in text.splitlines() if '"mosaic_gpu_v2"' in line]
    names = [re.search(r'op_name="[^"]*/(\w+)/mpmd_map"', line) for line in calls]
    # Forward and its further rounds, both again in the backward pass, and that pass's own two.
    assert len(calls) >= 4
    assert {name.group(1) for name in names if name} == {
        "grouped_matmul",
        "grouped_matmul_weights",
    }
    assert " dot(" not in text
