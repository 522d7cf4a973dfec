"""SwiGLU experts by grouped products: the TPU's kernels, interpreted, against the dense loop."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, quick_jit
from jax.experimental.pallas import tpu as pltpu

from moe_jax.ops import dispatch, grouped_kernels, grouped_matmul, grouped_matmul_tpu
from moe_jax.ops.grouped_kernels import Products
from moe_jax.ops.grouped_matmul import Experts
from moe_jax.sharding import P

SIZE = 8


def _interpreted(interpret) -> Products:
    kernels = grouped_matmul_tpu.gmm, grouped_matmul_tpu.tgmm
    return Products(*(functools.partial(kernel, interpret=interpret) for kernel in kernels))


PRODUCTS = _interpreted(True)


class Case(NamedTuple):
    """Ids by row, and the shape of the experts."""

    ids_TK: np.ndarray
    num_experts: int
    dim: int = 6
    hidden: int = 5


def _random(rows: int, num_experts: int, top_k: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    return np.stack([rng.permutation(num_experts)[:top_k] for _ in range(rows)])


CASES = {
    "random": Case(_random(40, 5, 2), 5),
    "an expert without rows": Case(np.where(_random(40, 5, 2) == 2, -1, _random(40, 5, 2)), 5),
    "one expert takes all": Case(np.tile([3, 5], (40, 1)), 5),
    "the first and the last without rows": Case(1 + _random(40, 3, 2), 5),
    "nothing": Case(np.full((40, 2), -1), 5),
    "whole tiles": Case(np.repeat(np.arange(4), 2 * SIZE)[:, None], 4),
    "more experts than rows": Case(_random(3, 16, 2), 16),
    "the same expert twice": Case(np.tile([2, 2], (11, 1)), 5),
    "one row": Case(np.array([[1, 0]]), 2),
    "several blocks, the last of them cut": Case(_random(24, 3, 2), 3, 384, 128),
}


def _inputs(case: Case, dtype: str):
    rng = np.random.default_rng(9)

    def normal(*shape: int) -> np.ndarray:
        values = rng.normal(size=shape) / np.sqrt(shape[-2])
        return values.astype(dtype).astype(np.float32)

    rows = case.ids_TK.shape
    x = normal(1, rows[0], case.dim)[0].astype(dtype) * np.sqrt(rows[0]).astype(dtype)
    weights = rng.uniform(0.2, 1.5, rows).astype(np.float32)
    experts = Experts(
        normal(case.num_experts, case.dim, 2 * case.hidden),
        normal(case.num_experts, case.hidden, case.dim),
    )
    direction = rng.normal(size=x.shape).astype(np.float32)
    return x, weights, experts, direction


@functools.partial(quick_jit, static_argnames=("num_experts", "products", "spare_tiles"))
def _by_kernels(x, weights, experts, direction, ids, *, num_experts, products, spare_tiles=0):
    num_tiles = ids.size // SIZE + min(ids.size, num_experts) + spare_tiles
    tiles = grouped_matmul.make_tiles(ids, num_experts, SIZE)

    def loss(x, weights, experts):
        y = grouped_kernels.swiglu_experts(
            x, weights, experts, tiles, num_tiles, SIZE, products
        )
        return jnp.sum(y * direction), y

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weights, experts)


@quick_jit
def _by_reference(x, weights, experts, direction, ids):
    def loss(x, weights, experts):
        y = dispatch.experts_reference(x, weights, ids, experts)
        return jnp.sum(y * direction), y

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weights, experts)


def _check(case: Case, dtype: str, **options) -> None:
    x, weights, experts, direction = _inputs(case, dtype)
    ids = case.ids_TK.astype(np.int32)
    gradients, y = _by_kernels(
        x, weights, experts, direction, ids, num_experts=case.num_experts, **options
    )
    wide = x.astype(np.float32)
    expected_gradients, expected_y = _by_reference(wide, weights, experts, direction, ids)
    assert gradients[0].dtype == dtype
    chex.assert_type([y, *jax.tree.leaves(gradients[1:])], jnp.float32)
    got = y, gradients[0].astype(jnp.float32), *gradients[1:]
    for ours, theirs in zip(
        jax.tree.leaves(got), jax.tree.leaves((expected_y, *expected_gradients)), strict=True
    ):
        scale = max(1.0, np.max(np.abs(theirs)))
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_loop(name: str, dtype: str) -> None:
    _check(CASES[name], dtype, products=PRODUCTS)


def test_spare_tiles_and_stale_memory_change_nothing() -> None:
    """In the simulator, memory that nobody wrote is NaN, and a block written twice is an error."""
    simulated = _interpreted(pltpu.InterpretParams())
    _check(CASES["an expert without rows"], "float32", products=simulated, spare_tiles=4)
