"""Linear, RMSNorm, Embedding and SwiGLU, against float64 on one device and on split weights."""

import functools
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh
from flax import nnx

from moe_jax import sharding
from moe_jax.config import PrecisionConfig
from moe_jax.layers.linear import Embedding, Initializer, Linear, RMSNorm
from moe_jax.layers.mlp import SwiGLU

F32 = jnp.dtype("float32")
BF16 = jnp.dtype("bfloat16")
HALF, THIRD = Initializer("normal", 0.5), Initializer("normal", 0.3)


@pytest.fixture(params=[{"fsdp": 1}, {"fsdp": 2, "expert": 2}], ids=str)
def mesh(request: pytest.FixtureRequest) -> Iterator[jax.sharding.Mesh]:
    mesh = make_mesh(**request.param)
    with jax.set_mesh(mesh):
        yield mesh


def _rows(mesh: jax.sharding.Mesh, *shape: int, dtype: jnp.dtype = F32) -> jax.Array:
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    return jax.device_put(x, jax.NamedSharding(mesh, sharding.BATCH))


def _float64(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize(
    ("in_dims", "out_dims", "axes", "equation"),
    [
        ((6,), (8,), ("embed", None), "blx,xy->bly"),
        ((6,), (3, 4), ("latent", None, None), "blx,xyz->blyz"),
        ((3, 4), (6,), (None, None, "embed"), "blxy,xyz->blz"),
    ],
    ids=["plain", "to heads", "from heads"],
)
def test_linear_is_a_product(mesh, in_dims, out_dims, axes, equation) -> None:
    layer = Linear(in_dims, out_dims, axes, initializer=HALF, dtype=F32, rngs=nnx.Rngs(0))
    weight = layer.weight[...]
    chex.assert_shape(weight, (*in_dims, *out_dims))
    x = _rows(mesh, 4, 5, *in_dims)
    y = layer(x)
    chex.assert_trees_all_close(
        y, np.einsum(equation, _float64(x), _float64(weight)), rtol=1e-5, atol=1e-5
    )
    assert y.sharding.spec[0] == sharding.BATCH_AXES or mesh.size == 1


def test_linear_narrow_operands_and_wide_result(mesh) -> None:
    shared = dict(initializer=HALF, dtype=BF16, rngs=nnx.Rngs(0))
    narrow = Linear((64,), (8,), ("embed", None), **shared)
    wide = Linear((64,), (8,), ("embed", None), output_dtype=F32, **shared)
    chex.assert_type([narrow.weight[...], wide.weight[...]], jnp.float32)
    x = _rows(mesh, 4, 64)
    assert narrow(x).dtype == BF16
    assert wide(x).dtype == F32
    # The operands are rounded, the sum is not.
    expected = _float64(x.astype(BF16)) @ _float64(wide.weight[...].astype(BF16))
    chex.assert_trees_all_close(wide(x), expected, rtol=1e-5, atol=1e-5)


def test_initial_weights_have_their_spread_and_do_not_depend_on_the_mesh(mesh) -> None:
    weight = Linear(
        (64,),
        (64,),
        ("embed", None),
        initializer=THIRD,
        dtype=F32,
        rngs=nnx.Rngs(5),
    ).weight[...]
    assert abs(float(jnp.std(weight)) - 0.3) < 0.02
    assert abs(float(jnp.mean(weight))) < 0.02
    alone = make_mesh()
    with jax.set_mesh(alone):
        same = Linear(
            (64,),
            (64,),
            ("embed", None),
            initializer=THIRD,
            dtype=F32,
            rngs=nnx.Rngs(5),
        )
        expected = np.asarray(same.weight[...])
    chex.assert_trees_all_close(np.asarray(weight), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rms_norm(mesh, dtype) -> None:
    norm = RMSNorm(6, 0.1)
    chex.assert_trees_all_equal(norm.scale[...], jnp.ones(6))
    norm.scale[...] = jnp.arange(1.0, 7.0)
    x = _rows(mesh, 4, 3, 6, dtype=dtype)
    wide = _float64(x)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * np.arange(1.0, 7.0)
    y = norm(x)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == F32 else 2**-8
    chex.assert_trees_all_close(_float64(y), expected, rtol=tolerance, atol=1e-6)


def test_embedding_takes_rows(mesh) -> None:
    layer = Embedding(16, 8, initializer=HALF, dtype=F32, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(1).integers(0, 16, (4, 5)).astype(np.int32)
    placed = jax.device_put(tokens, jax.NamedSharding(mesh, sharding.BATCH))
    table = np.asarray(layer.weight[...])
    chex.assert_trees_all_equal(np.asarray(layer(placed)), table[tokens])
    assert Embedding(16, 8, initializer=HALF, dtype=BF16, rngs=nnx.Rngs(0))(placed).dtype == BF16


def test_a_tied_table_is_the_head_as_well(mesh) -> None:
    """Its gradient is the sum of both uses; it stays split as the table is."""
    layer = Embedding(16, 8, initializer=HALF, dtype=F32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 16, (4, 5)).astype(np.int32)
    direction = rng.normal(size=(4, 5, 16)).astype(np.float32)
    rows = jax.NamedSharding(mesh, sharding.BATCH)
    placed, placed_direction = jax.device_put((tokens, direction), rows)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(layer):
        logits = layer.logits(layer(placed))
        return jnp.sum(logits * placed_direction), logits

    (_, logits), gradient = run(layer)
    table = _float64(layer.weight[...])
    assert logits.dtype == jnp.float32
    chex.assert_trees_all_close(logits, table[tokens] @ table.T, rtol=1e-5, atol=1e-5)
    expected = np.einsum("blv,bld->vd", direction, table[tokens])
    np.add.at(expected, tokens, direction @ table)
    found = gradient.weight[...]
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.sharding == layer.weight[...].sharding


def test_swiglu(mesh) -> None:
    precision = PrecisionConfig(compute_dtype="float32")
    layer = SwiGLU(6, 10, initializer=HALF, precision=precision, rngs=nnx.Rngs(0))
    x = _rows(mesh, 4, 3, 6)
    gate, up, down = (_float64(part.weight[...]) for part in (layer.gate, layer.up, layer.down))
    opened = _float64(x) @ gate
    expected = (opened / (1 + np.exp(-opened)) * (_float64(x) @ up)) @ down
    chex.assert_trees_all_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_fan_in_follows_the_inputs_and_is_cut_off(mesh) -> None:
    """Variance 0.1 / 64, less what the cut takes; nothing beyond two standard deviations."""
    table = Embedding(512, 64, initializer=Initializer("fan_in", 0.1), dtype=F32, rngs=nnx.Rngs(0))
    assert np.std(table.weight[...]) == pytest.approx(0.88 * (0.1 / 64) ** 0.5, rel=0.02)
    layer = Linear(
        (16, 4),
        (512,),
        (None, None, None),
        initializer=Initializer("fan_in", 0.1),
        dtype=F32,
        rngs=nnx.Rngs(0),
    )
    weight, std = np.asarray(layer.weight[...]), (0.1 / 64) ** 0.5
    assert 1.95 * std < np.max(np.abs(weight)) <= 2 * std
    assert np.std(weight) == pytest.approx(0.88 * std, rel=0.02)
