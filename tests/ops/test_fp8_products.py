"""Products whose operands have eight bits, against float64 on operands that NumPy rounds."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, quick_jit

from moe_jax import sharding
from moe_jax.ops import (
    fp8,
    fp8_experts,
    fp8_native,
    grouped_kernels,
    grouped_loops,
    grouped_matmul,
)
from moe_jax.ops.backends import Backends
from moe_jax.ops.fp8_products import Fp8Product, Fp8SwiGLU
from moe_jax.ops.fp8_recipes import KEPT, RECIPES, Recipe, Scaling
from moe_jax.ops.fp8_state import EXACT, HISTORY, WIDTH
from moe_jax.ops.grouped_matmul import Experts
from moe_jax.sharding import BATCH_AXES, P

F32 = jnp.dtype(jnp.float32)
CURRENT = [name for name, recipe in RECIPES.items() if not recipe.delayed]


def _rounded(x: np.ndarray, scaling: Scaling, summed_dim: int) -> np.ndarray:
    """`fp8.rounded` is held to `ml_dtypes` in test_fp8.py."""
    return np.asarray(scaling.rounded(jnp.asarray(x, F32), summed_dim), np.float64)


def _expected(x: np.ndarray, w: np.ndarray, dy: np.ndarray, recipe: Recipe) -> list[np.ndarray]:
    """The three products, in float64."""
    return [
        _rounded(x, recipe.activation, 1) @ _rounded(w, recipe.weight, 0),
        _rounded(dy, recipe.gradient, 1) @ _rounded(w, recipe.weight, 1).T,
        _rounded(x, recipe.activation, 0).T @ _rounded(dy, recipe.gradient, 0),
    ]


def _products(recipe: Recipe, x: Any, w: Any, dy: Any, num_in_dims: int = 1) -> tuple[Any, ...]:
    product = Fp8Product(recipe)
    y, pull_back = jax.vjp(lambda x, w: product(x, w, num_in_dims, F32, None), x, w)
    return y, *pull_back(dy)


def _data(rows: int, inputs: int, outputs: int, kind: str = "gaussian") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.normal(size=shape) * scale
        for shape, scale in (
            ((rows, inputs), 1),
            ((inputs, outputs), 0.02),
            ((rows, outputs), 1e-6),
        )
    )
    if kind == "outliers":  # in single channels
        x[:, 5] *= 1e7
        dy[:, 7] *= 3e4
    return [a.astype(np.float32) for a in (x, w, dy)]


@pytest.mark.parametrize("name", CURRENT)
def test_equals_float64_on_rounded_operands(name: str) -> None:
    x, w, dy = _data(300, 200, 136)
    got = quick_jit(lambda *a: _products(RECIPES[name], *a))(x, w, dy)
    for result, expected in zip(got, _expected(x, w, dy, RECIPES[name]), strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_several_dims_are_one() -> None:
    x, w, dy = _data(24, 4 * 40, 2 * 72)
    recipe = RECIPES["fp8_block"]
    shaped = x.reshape(2, 12, 4, 40), w.reshape(4, 40, 2, 72), dy.reshape(2, 12, 2, 72)
    got = quick_jit(lambda *a: _products(recipe, *a, num_in_dims=2))(*shaped)
    flat = quick_jit(lambda *a: _products(recipe, *a))(x, w, dy)
    for result, expected, like in zip(got, flat, (shaped[2], *shaped[:2]), strict=True):
        np.testing.assert_array_equal(result, expected.reshape(like.shape))


def test_a_block_recipe_is_near_float32_on_gaussian_data() -> None:
    x, w, dy = _data(512, 384, 256)
    got = quick_jit(lambda *a: _products(RECIPES["fp8_block"], *a))(x, w, dy)
    for result, exact in zip(got, (x @ w, dy @ w.T, x.T @ dy), strict=True):
        assert _cosine(result, exact) > 0.999


def test_outliers_spoil_tensors_and_not_tiles() -> None:
    x, w, dy = _data(256, 512, 512, "outliers")
    # Of the channels without an outlier.
    exact = (dy @ w.T)[:, 100:], (x.T @ dy)[100:, 100:]
    errors = {}
    for name in ("fp8_tensor", "fp8_block"):
        _, dx, dw = quick_jit(lambda *a, name=name: _products(RECIPES[name], *a))(x, w, dy)
        errors[name] = _error(dw[100:, 100:], exact[1])
    assert errors["fp8_block"] < 0.06 < 0.5 < errors["fp8_tensor"]


@pytest.mark.parametrize("name", CURRENT)
@pytest.mark.parametrize("sign", ["both signs", "positive"])
def test_errors_have_no_sign(name: str, sign: str) -> None:
    """Sums of positive numbers would show a rounding up or down that signs hide.

    Those are spread evenly over whole cells of a format's numbers, from 17 to 31; where no cell is
    cut in two, rounding to the nearest is without bias. One number in eight is 448, so that all
    scales are powers of two.
    """
    rng = np.random.default_rng(4)
    shapes = (1000, 8, 160), (1000, 160, 8), (1000, 8, 8)
    if sign == "positive":
        x, w, dy = (rng.uniform(17, 31, shape).astype(np.float32) for shape in shapes)
        for a in (x, w, dy):
            a[:, (np.arange(a.shape[1])[:, None] + np.arange(a.shape[2])) % 8 == 0] = 448
    else:
        x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    got = quick_jit(jax.vmap(lambda *a: _products(RECIPES[name], *a)))(x, w, dy)
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    exact = x @ w, dy @ w.swapaxes(1, 2), x.swapaxes(1, 2) @ dy
    for result, expected in zip(got, exact, strict=True):
        means = np.mean(np.asarray(result, np.float64) - expected, axis=(1, 2))
        assert abs(np.mean(means)) < 3 * np.std(means) / np.sqrt(len(means))
        # The test has teeth: a bias of a thousandth would be seen.
        if sign == "positive":
            assert 3 * np.std(means) / np.sqrt(len(means)) < 1e-3 * np.mean(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_reaches_the_results(bad: float) -> None:
    for which in range(3):
        inputs = _data(130, 130, 20)
        inputs[which][1, 2] = bad
        y, dx, dw = quick_jit(lambda *a: _products(RECIPES["fp8_block"], *a))(*inputs)
        assert np.isnan(y).any() == (which < 2)
        assert np.isnan(dx).any() == (which > 0)
        assert np.isnan(dw).any() == (which != 1)


def test_swiglu_keeps_its_inputs_in_eight_bits() -> None:
    recipe, (x, w, dy) = RECIPES["fp8_block"], _data(130, 2 * 200, 136)
    w = w[:200]

    def hidden(x):
        gate, up = np.split(x, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up

    y, pull_back = jax.vjp(lambda x, w: Fp8SwiGLU(recipe)(x, w, 1, F32, None), x, w)
    dx, dw = pull_back(dy)
    np.testing.assert_allclose(y, _expected(hidden(x), w, dy, recipe)[0], atol=2e-4)
    kept = np.asarray(KEPT.rounded(jnp.asarray(x), 1), np.float64)
    _, dhidden, expected = _expected(hidden(kept).astype(np.float32), w, dy, recipe)
    # Where NumPy's silu rounds otherwise, a number of eight bits is another.
    assert _error(dw, expected) < 2e-3
    gate, up = np.split(kept, 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    assert _error(dx, np.concatenate([dgate, dhidden * gate * sigmoid], axis=1)) < 1e-5


def test_delayed_scales_are_of_the_history() -> None:
    recipe, (x, w, dy) = RECIPES["fp8_delayed"], _data(64, 32, 16)
    state = np.zeros((3, WIDTH), np.float32)
    state[0, 3], state[0, HISTORY - 1] = 0.5, 0.25  # less than x's largest, which saturates

    def run(x, w, dy, state):
        product = Fp8Product(recipe)
        y, pull_back = jax.vjp(lambda x, w, state: product(x, w, 1, F32, state), x, w, state)
        return y, pull_back(dy)[2]

    mesh, rows = make_mesh(fsdp=2), P(BATCH_AXES)

    def region(x, w, dy, state):
        return run(x, sharding.vary(w), dy, state)

    mapped = jax.shard_map(region, in_specs=(rows, P(), rows, P()), out_specs=(rows, P()))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))
            for a, spec in ((x, rows), (w, P()), (dy, rows), (state, P()))
        ]
        y, report = quick_jit(mapped)(*placed)
    scaled = fp8.dequantize(
        fp8.quantize(x, (None, None), scales=jnp.full((1, 1), 0.5 / 448)), (None, None)
    )
    np.testing.assert_allclose(y, scaled @ recipe.weight.rounded(w, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(report[:, 0], [np.abs(a).max() for a in (x, w, dy)], rtol=1e-6)


@pytest.mark.parametrize("name", CURRENT)
@pytest.mark.parametrize("choices", ["random", "one expert", "an empty expert"])
def test_experts_equal_products_expert_by_expert(name: str, choices: str) -> None:
    rng, recipe = np.random.default_rng(5), RECIPES[name]
    rows, dim, hidden, experts = 150, 136, 48, 3
    x = rng.normal(size=(rows, dim)).astype(np.float32)
    ids = {
        "random": rng.integers(0, experts, (rows, 1)),
        "one expert": np.ones((rows, 1)),
        "an empty expert": rng.integers(0, 2, (rows, 1)) * 2,
    }[choices].astype(np.int32)
    weights = np.ones((rows, 1), np.float32)
    w = Experts(
        jnp.asarray(rng.normal(size=(experts, dim, 2 * hidden)) * 0.1, F32),
        jnp.asarray(rng.normal(size=(experts, hidden, dim)) * 0.1, F32),
    )
    dy = rng.normal(size=(rows, dim)).astype(np.float32)
    backends = Backends(recipe=recipe)
    size = grouped_matmul.tile_size(rows / experts, backends)
    assert size % fp8.TILE == 0, "a tile of slots has scales of its own"
    num_tiles = rows // size + experts

    @quick_jit
    def run(x, weights, w, dy):
        tiles = grouped_matmul.make_tiles(ids, experts, size)
        y, pull_back = jax.vjp(
            lambda x, w: grouped_matmul.swiglu_experts(
                x, weights, w, tiles, num_tiles, size, backends
            ),
            x,
            w,
        )
        return y, *pull_back(dy)

    y, dx, dw = run(x, weights, w, dy)
    rows_of = [ids[:, 0] == i for i in range(experts)]

    def by_expert(a: np.ndarray, summed_dim: int, scaling: Scaling) -> list[np.ndarray]:
        """Rounded; one scale of all rows is of those of all experts."""
        if scaling.rows is None:
            return [_rounded(a, scaling, summed_dim)[here] for here in rows_of]
        parts = [a[here] for here in rows_of]
        return [_rounded(a, scaling, summed_dim) if len(a) else a for a in parts]

    def times(a: np.ndarray, w_EAB: jax.Array, summed_dim: int, scaling: Scaling) -> np.ndarray:
        """a times the weights of each row's expert, or their transpose."""
        result = np.zeros((rows, w_EAB.shape[3 - summed_dim]))
        for i, a_here in enumerate(by_expert(a, 1, scaling)):
            w_here = _rounded(np.asarray(w_EAB[i]), recipe.weight, summed_dim - 1)
            result[rows_of[i]] = a_here @ (w_here if summed_dim == 1 else w_here.T)
        return result.astype(np.float32)

    def sums(a: np.ndarray, dy: np.ndarray) -> np.ndarray:
        """a^T dy over each expert's rows."""
        pairs = zip(
            by_expert(a, 0, recipe.activation), by_expert(dy, 0, recipe.gradient), strict=True
        )
        return np.stack([a.T @ dy for a, dy in pairs])

    opened = times(x, w.gate_up_EDH, 1, recipe.activation)
    expected = times(np.asarray(_hidden(opened)), w.down_EFD, 1, recipe.activation)
    # Where silu rounds otherwise, a number of eight bits is another.
    assert _error(y, expected) < 3e-3
    kept = np.asarray(KEPT.rounded(opened, 1))
    hidden, pull_back = jax.vjp(_hidden, kept)
    dopened = np.asarray(pull_back(jnp.asarray(times(dy, w.down_EFD, 2, recipe.gradient)))[0])
    assert _error(dx, times(dopened, w.gate_up_EDH, 2, recipe.gradient)) < 3e-3
    assert _error(dw.gate_up_EDH, sums(x, dopened)) < 3e-3
    assert _error(dw.down_EFD, sums(np.asarray(hidden), dy)) < 3e-3
    for i in range(experts):
        if not rows_of[i].any():
            np.testing.assert_array_equal(dw.gate_up_EDH[i], 0)


def _hidden(opened: jax.Array) -> jax.Array:
    gate, up = jnp.split(opened, 2, axis=1)
    return jax.nn.silu(gate) * up


def _twice_gmm(x, x_scales, w, w_scales, tiles, used, *, dtype):
    x = fp8.dequantize(fp8.Quantized(x, x_scales), (1, 128))
    w = fp8.dequantize(fp8.Quantized(w, w_scales), (1, 128, 128))
    return 2 * grouped_loops.gmm(x, w, tiles, used, transpose_weights=True).astype(dtype)


def _twice_tgmm(x, x_scales, y, y_scales, tiles, used, num_experts):
    x, y = (fp8.dequantize(fp8.Quantized(*a), (1, 128)).T for a in ((x, x_scales), (y, y_scales)))
    return 2 * grouped_loops.tgmm(x, y, tiles, used, num_experts)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_kernels_give_way_where_a_product_takes_an_operand_as_it_is(
    kind: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops stand in for kernels; what they give is twice the right result, to be known by."""
    kernels = types.SimpleNamespace(gmm_fp8=_twice_gmm, tgmm_fp8=_twice_tgmm)
    monkeypatch.setattr(fp8_native, "_kernels", lambda recipe, dims: (kernels, None))
    monkeypatch.setitem(fp8_native.DENSE_TILE, "cpu", 128)
    recipe, (x, w, dy) = RECIPES["fp8_block"], _data(512, 136, 72)

    def dense(form, x, w, dy, state):
        product = Fp8Product(recipe, form=form)
        y, pull_back = jax.vjp(lambda x, w: product(x, w, 1, F32, state), x, w)
        return y, *pull_back(dy)

    def grouped(form, x, w, dy, state):
        products = fp8_experts.products(grouped_kernels.products_of("portable"), recipe, F32, form)
        tiles, used = jnp.zeros((2,), jnp.int32), jnp.int32(2)
        gmm = functools.partial(products.gmm, state=state)
        dx = gmm(dy, w[None], tiles, used, transpose_weights=True)
        dw = products.tgmm(x, dy, tiles, used, 1, state=state)
        return gmm(x, w[None], tiles, used), dx, dw[0]

    state = np.zeros((3, WIDTH), np.float32)
    state[:, EXACT] = exact
    mesh, rows = make_mesh(fsdp=2), P(BATCH_AXES)

    def run(form):
        def region(x, w, dy, state):
            if kind == "dense":
                return dense(form, x, sharding.vary(w), dy, state)
            return grouped(form, x, sharding.vary(w), dy, sharding.vary(state))

        specs = {"in_specs": (rows, P(), rows, P()), "out_specs": rows}
        placed = [
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in zip((x, w, dy, state), specs["in_specs"], strict=True)
        ]
        return quick_jit(jax.shard_map(region, **specs))(*placed)

    with jax.set_mesh(mesh):
        found, expected = run("native"), run("portable")
    for a, b in zip(found, expected, strict=True):
        factor = 1 if exact else 2
        np.testing.assert_allclose(a, factor * b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_loops_multiply_each_tile_by_its_expert() -> None:
    rng = np.random.default_rng(6)
    expert_of_tile, used, size = np.array([0, 2, 2, 3, 3], np.int32), 4, 8
    x, y = (rng.normal(size=(40, n)).astype(np.float32) for n in (6, 5))
    w = rng.normal(size=(4, 6, 5)).astype(np.float32)
    tiles = jnp.asarray(expert_of_tile), jnp.int32(used)
    got = quick_jit(grouped_loops.gmm)(x, w, *tiles)
    turned = grouped_loops.gmm(x, w.swapaxes(1, 2), *tiles, transpose_weights=True)
    sums = grouped_loops.tgmm(x, y, *tiles, 4)
    expected = np.zeros((4, 6, 5))
    for tile, expert in enumerate(expert_of_tile[:used]):
        here = slice(tile * size, (tile + 1) * size)
        for result in (got, turned):
            np.testing.assert_allclose(result[here], x[here] @ w[expert], rtol=1e-5, atol=1e-5)
        expected[expert] += x[here].T @ y[here]
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


def _cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def _error(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
