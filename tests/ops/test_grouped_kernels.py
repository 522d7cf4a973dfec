"""SwiGLU experts by grouped products: the TPU's kernels, interpreted, against the dense loop."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, quick_jit
from jax.experimental.pallas import tpu as pltpu

from moe_jax.ops import dispatch, grouped_kernels, grouped_matmul, grouped_matmul_tpu, slots
from moe_jax.ops.backends import Backends
from moe_jax.ops.grouped_kernels import Products
from moe_jax.ops.grouped_matmul import Experts
from moe_jax.sharding import BATCH, BATCH_AXES, EXPERT_AXES, P

ROWS, TOP_K, EXPERTS, DIM, HIDDEN, SIZE = 40, 2, 5, 6, 4, 8


def _interpreted(interpret: Any) -> Products:
    gmm = functools.partial(grouped_matmul_tpu.gmm, interpret=interpret)
    tgmm = functools.partial(grouped_matmul_tpu.tgmm, interpret=interpret)
    return Products(gmm, tgmm, functools.partial(grouped_kernels.sum_by_product, tgmm))


PRODUCTS = _interpreted(True)


def _random(low: int = 0, high: int = EXPERTS, rows: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(rows + high)
    return np.stack([low + rng.permutation(high - low)[:TOP_K] for _ in range(rows)])


ROUTINGS = {
    "random": _random(),
    "an expert without rows": np.where(_random() == 2, -1, _random()),
    "neither the first nor the last": _random(1, EXPERTS - 1),
    "one expert takes all": np.tile([3, EXPERTS], (ROWS, 1)),
    "both choices are one expert": np.tile([4, 4], (ROWS, 1)),
    "whole tiles": np.repeat(np.arange(EXPERTS), 2 * SIZE).reshape(ROWS, TOP_K),
    "a single choice": np.where(np.arange(ROWS * TOP_K).reshape(ROWS, TOP_K) == 33, 1, -1),
    "nothing": np.full((ROWS, TOP_K), -1),
}


class Inputs(NamedTuple):
    x: jax.Array
    weights: jax.Array
    experts: Experts


def _inputs(rows: int, experts: int, dim: int, hidden: int, dtype: str) -> Inputs:
    """The weights of experts are float32 of values that `dtype` holds."""
    rng = np.random.default_rng(9)

    def normal(scale: float, *shape: int) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(dtype)

    weights = Experts(
        normal(dim**-0.5, experts, dim, 2 * hidden), normal(hidden**-0.5, experts, hidden, dim)
    )
    return Inputs(
        normal(1, rows, dim),
        rng.uniform(0.2, 1.5, (rows, TOP_K)).astype(np.float32),
        jax.tree.map(lambda w: w.astype(np.float32), weights),
    )


def _with_gradients(function, inputs: Inputs, has_aux: bool = False):
    """function(inputs) and the gradients of its sum with random weights."""
    direction = jnp.asarray(np.random.default_rng(1).normal(size=inputs.x.shape), jnp.float32)
    y, pull_back, *aux = jax.vjp(function, inputs, has_aux=has_aux)
    return y, pull_back(direction)[0], *aux


@functools.partial(quick_jit, static_argnums=(2, 3))
def _by_kernels(inputs, ids, products: Products, spare_tiles: int = 0):
    num_experts = len(inputs.experts.down_EFD)
    num_tiles = ids.size // SIZE + min(ids.size, num_experts) + spare_tiles
    tiles = grouped_matmul.make_tiles(ids, num_experts, SIZE)

    def function(inputs):
        return grouped_kernels.swiglu_experts(*inputs, tiles, num_tiles, SIZE, products)

    return _with_gradients(function, inputs)


@quick_jit
def _by_reference(inputs, ids):
    def function(inputs):
        return dispatch.experts_reference(inputs.x, inputs.weights, ids, inputs.experts)

    return _with_gradients(function, inputs)


def _check_close(ours, theirs, tolerance: float) -> None:
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(1.0, np.max(np.abs(their)))
        np.testing.assert_allclose(np.asarray(our, np.float32), their, atol=tolerance * scale)


def _check(inputs: Inputs, ids: np.ndarray, *, products=PRODUCTS, spare_tiles: int = 0) -> None:
    ids = ids.astype(np.int32)
    y, gradients = _by_kernels(inputs, ids, products, spare_tiles)
    expected = _by_reference(inputs._replace(x=inputs.x.astype(np.float32)), ids)
    assert gradients.x.dtype == inputs.x.dtype
    chex.assert_type(jax.tree.leaves((y, gradients.weights, gradients.experts)), jnp.float32)
    _check_close((y, gradients), expected, 1e-5 if inputs.x.dtype == np.float32 else 2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_equals_the_dense_loop(name: str, dtype: str) -> None:
    _check(_inputs(ROWS, EXPERTS, DIM, HIDDEN, dtype), ROUTINGS[name])


def test_more_experts_than_rows() -> None:
    _check(_inputs(3, 16, DIM, HIDDEN, "float32"), _random(high=16, rows=3))


def test_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in two steps, and 384 columns in two blocks, of which the last is cut."""
    monkeypatch.setattr(grouped_matmul_tpu, "VMEM_OF_BLOCKS", 600_000)
    _check(_inputs(24, 3, 1024, 192, "bfloat16"), _random(high=3, rows=24))


def test_unwritten_memory_changes_nothing() -> None:
    """In the simulator it is NaN, and to write a block twice is an error."""
    inputs = _inputs(ROWS, EXPERTS, DIM, HIDDEN, "float32")
    simulated = _interpreted(pltpu.InterpretParams())
    _check(inputs, ROUTINGS["an expert without rows"], products=simulated, spare_tiles=4)


@pytest.mark.parametrize("nowhere", [0.0, 0.7, 1.0])
def test_sum_by_product(nowhere: float) -> None:
    """Over several blocks of rows."""
    rng = np.random.default_rng(0)
    rows, num_slots = 300, 700
    slot_of = rng.permutation(num_slots)[: rows * TOP_K].reshape(rows, TOP_K)
    slot_of = np.where(rng.random(slot_of.shape) < nowhere, num_slots, slot_of).astype(np.int32)
    y = rng.normal(size=(num_slots, DIM)).astype(np.float32)
    expected = slots.sum_of_slots(jnp.asarray(y), jnp.asarray(slot_of))
    got = quick_jit(PRODUCTS.sum_of_slots)(y, slot_of)
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-6)


def test_in_rounds_of_rematerialized_layers_on_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices, two scanned layers, and so small buffers that the while_loop runs."""
    monkeypatch.setattr(grouped_kernels, "products_of", lambda backend, recipe, form: PRODUCTS)
    monkeypatch.setitem(grouped_matmul.TILE_SIZES, "tpu", (SIZE, SIZE, 1))
    mesh = make_mesh(expert=2)
    inputs, ids = _inputs(ROWS, 4, DIM, HIDDEN, "float32"), _random(high=4).astype(np.int32)
    balanced = dispatch.Balanced(ROWS // 2, TOP_K, 4, 0.5)
    varying = ("data", "fsdp")

    def region(x, weights, ids, experts):
        local = jax.tree.map(lambda w: jax.lax.pcast(w, varying, to="varying"), experts)

        @jax.checkpoint
        def layer(x, _):
            y, rounds = dispatch.apply_experts(
                x,
                weights,
                ids,
                local,
                balanced,
                axes=EXPERT_AXES,
                all_axes=BATCH_AXES,
                combine_dtype=jnp.dtype("float32"),
                backends=Backends(grouped_matmul="tpu"),
            )
            return x + y, rounds

        return jax.lax.scan(layer, x, length=2)

    # The interpreter of kernels does not know by which axes values vary.
    in_specs = BATCH, BATCH, BATCH, Experts(*[P(EXPERT_AXES)] * 2)
    mapped = jax.shard_map(region, in_specs=in_specs, out_specs=(BATCH, P()), check_vma=False)

    def on_mesh(inputs):
        return mapped(inputs.x, inputs.weights, ids, inputs.experts)

    def reference(inputs):
        x = inputs.x
        for _ in range(2):
            x += dispatch.experts_reference(x, inputs.weights, ids, inputs.experts)
        return x

    with jax.set_mesh(mesh):
        specs = Inputs(BATCH, BATCH, in_specs[-1])
        placed = jax.device_put(
            inputs, jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
        )
        ids = jax.device_put(ids, jax.NamedSharding(mesh, BATCH))
        got = quick_jit(functools.partial(_with_gradients, on_mesh, has_aux=True))(placed)
    ids = np.asarray(ids)
    *got, rounds = jax.tree.map(np.asarray, got)
    assert np.min(rounds) > 1
    _check_close(got, quick_jit(functools.partial(_with_gradients, reference))(inputs), 1e-5)
