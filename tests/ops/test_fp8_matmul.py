"""FP8 products with a scale for each 128: kernels interpreted on the CPU, lowered, refused."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from moe_jax.ops import fp8_matmul_gpu, fp8_matmul_tpu, grouped_matmul_tpu

EXPERTS, TILES, BLOCK = 3, 4, 128
# Sums of one block and a half; two blocks of columns of a GPU's, the second ends outside, and so
# does its scale.
DIM_A, DIM_B = 192, 320
FP8 = jnp.float8_e4m3fn


class Kernels(NamedTuple):
    size: int
    gmm: Callable[..., jax.Array]
    tgmm: Callable[..., jax.Array]


@pytest.fixture(scope="module", params=["gpu", "tpu"])
def kernels(request) -> Kernels:
    if request.param == "gpu":
        if not hasattr(plgpu, "InterpretGPUParams"):
            pytest.skip(f"jax {jax.__version__} cannot interpret kernels with transposed operands")
        size, module = 128, fp8_matmul_gpu
        options = {"interpret": plgpu.InterpretGPUParams(detect_races=True), "programs": 2}
    else:
        # In the simulator, unwritten memory is NaN.
        size, module, options = 256, fp8_matmul_tpu, {"interpret": pltpu.InterpretParams()}
    gmm = functools.partial(module.gmm_fp8, dtype=jnp.float32, **options)
    tgmm = functools.partial(module.tgmm_fp8, num_experts=EXPERTS, **options)
    return Kernels(size, jax.jit(gmm), jax.jit(tgmm))


class Operand(NamedTuple):
    values: np.ndarray
    scales: np.ndarray

    def dequantised(self, block: int = 1) -> np.ndarray:
        """In float64; a scale belongs to `block` rows."""
        scales = np.repeat(np.repeat(self.scales, BLOCK, axis=-1), block, axis=-2)
        rows, columns = self.values.shape[-2:]
        return self.values.astype(np.float64) * scales[..., :rows, :columns]


def _whole(rng: np.random.Generator, *shape: int, block: int = 1) -> Operand:
    """Whole numbers and scales that are powers of two: sums are exact in whatever order."""
    values = rng.integers(-4, 5, shape).astype(np.float32)
    scales = 2.0 ** rng.integers(-4, 5, _scales_shape(shape, block))
    return Operand(values.astype(FP8), scales.astype(np.float32))


def _heavy_tailed(rng: np.random.Generator, *shape: int, block: int = 1) -> Operand:
    values = np.clip(rng.standard_t(1.5, shape) * 16, -448, 448)
    scales = np.exp(rng.normal(scale=4, size=_scales_shape(shape, block)))
    return Operand(values.astype(FP8), scales.astype(np.float32))


def _scales_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    *experts, rows, columns = shape
    return (*experts, -(-rows // block), -(-columns // BLOCK))


def _spoil(operand: Operand, live: int, axis: int) -> Operand:
    """With NaN past the first `live` of an axis: slots of unused tiles."""
    values, scales = (np.moveaxis(x.copy(), axis, 0) for x in operand)
    values[live:] = np.nan
    scales[live if axis == 0 else live // BLOCK :] = np.nan
    return Operand(np.moveaxis(values, 0, axis), np.moveaxis(scales, 0, axis))


@pytest.mark.parametrize(
    "random, tolerance, tiles_of_expert",
    [
        (_whole, 0, (2, 0, 1)),
        (_whole, 0, (0, 4, 0)),  # one has all
        (_whole, 0, (0, 0, 0)),
        (_heavy_tailed, 1e-6, (1, 0, 2)),
    ],
)
def test_products_are_those_of_each_tile_and_expert(
    kernels: Kernels, random, tolerance: float, tiles_of_expert: tuple[int, ...]
) -> None:
    size, slots, used = kernels.size, kernels.size * TILES, sum(tiles_of_expert)
    expert_of_tile = np.full(TILES, EXPERTS - 1, np.int32)
    expert_of_tile[:used] = np.repeat(np.arange(EXPERTS), tiles_of_expert)
    where = expert_of_tile, np.int32(used)
    rng = np.random.default_rng(0)
    x, w = random(rng, slots, DIM_A), random(rng, EXPERTS, DIM_B, DIM_A, block=BLOCK)
    x_turned, y_turned = random(rng, DIM_A, slots), random(rng, DIM_B, slots)

    def product(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """And the sum of magnitudes, of which rounding errors are a fraction."""
        return left @ right.T, np.abs(left) @ np.abs(right).T

    x_SA, w_EBA = x.dequantised(), w.dequantised(BLOCK)
    x_AS, y_BS = x_turned.dequantised(), y_turned.dequantised()
    want_SB, scale_SB = np.zeros((2, slots, DIM_B))
    want_EAB, scale_EAB = np.zeros((2, EXPERTS, DIM_A, DIM_B))
    for tile, expert in enumerate(expert_of_tile[:used]):
        rows = slice(tile * size, (tile + 1) * size)
        want_SB[rows], scale_SB[rows] = product(x_SA[rows], w_EBA[expert])
        sums = product(x_AS[:, rows], y_BS[:, rows])
        want_EAB[expert] += sums[0]
        scale_EAB[expert] += sums[1]

    live = used * size
    got_SB = kernels.gmm(*_spoil(x, live, 0), *w, *where)
    got_EAB = kernels.tgmm(*_spoil(x_turned, live, 1), *_spoil(y_turned, live, 1), *where)
    assert got_SB.dtype == got_EAB.dtype == jnp.float32
    assert np.all(np.abs(got_SB - want_SB)[:live] <= tolerance * scale_SB[:live])
    assert np.all(np.abs(got_EAB - want_EAB) <= tolerance * scale_EAB)


def test_tiles_too_long_for_a_tpu_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, w = _whole(rng, 2 * 256, DIM_A), _whole(rng, EXPERTS, DIM_B, DIM_A, block=BLOCK)
    arguments = *x, *w, np.array([0, 2], np.int32), np.int32(2)

    def product() -> jax.Array:
        return fp8_matmul_tpu.gmm_fp8(*arguments, interpret=True)

    whole = product()
    for module in (fp8_matmul_tpu, grouped_matmul_tpu):
        monkeypatch.setattr(module, "VMEM_OF_BLOCKS", 450_000)
    halved = jax.make_jaxpr(product)().eqns
    grids = [
        eqn.params["grid_mapping"].grid for eqn in halved if eqn.primitive.name == "pallas_call"
    ]
    assert grids == [(2, 4)]
    np.testing.assert_array_equal(product(), whole)


def _shapes(name: str, slots: int, dim_a: int, dim_b: int, dtype=FP8) -> tuple:
    """Of the arguments of gmm_fp8 or tgmm_fp8, for tiles of 128 slots."""
    tiles, blocks_a, blocks_b = (-(-dim // BLOCK) for dim in (slots, dim_a, dim_b))
    if name == "gmm_fp8":
        x, x_scales = (slots, dim_a), (slots, blocks_a)
        w, w_scales = (EXPERTS, dim_b, dim_a), (EXPERTS, blocks_b, blocks_a)
    else:
        x, x_scales, w, w_scales = (dim_a, slots), (dim_a, tiles), (dim_b, slots), (dim_b, tiles)
    shapes = (x, dtype), (x_scales, "float32"), (w, dtype), (w_scales, "float32")
    return tuple(
        jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((tiles,), "int32"), ((), "int32"))
    )


def _on(kind: str, platform: str):
    device = jax.sharding.AbstractDevice(kind, 1, platform)
    axis_types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("name", ["gmm_fp8", "tgmm_fp8"])
@pytest.mark.parametrize(
    "module, kind, platform, target",
    [
        (fp8_matmul_gpu, "NVIDIA H100 80GB HBM3", "cuda", "@mosaic_gpu_v2"),
        (fp8_matmul_tpu, "TPU7x", "tpu", "@tpu_custom_call"),
    ],
)
def test_lowers_to_a_kernel_with_fp8_operands(name, module, kind, platform, target) -> None:
    options = {"num_experts": EXPERTS} if name == "tgmm_fp8" else {}
    function = jax.jit(functools.partial(getattr(module, name), **options))
    with _on(kind, "gpu" if platform == "cuda" else platform):
        assert module.obstacle(*([[DIM_A, DIM_B]] if platform == "cuda" else [])) is None
        traced = function.trace(*_shapes(name, TILES * BLOCK, DIM_A, DIM_B))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert traced.out_info.dtype == (jnp.bfloat16 if name == "gmm_fp8" else jnp.float32)
    call = next(line for line in text.splitlines() if target in line)
    operands = call.rsplit(" : (", 1)[1].split("->")[0]
    assert operands.count("xf8E4M3FN>") == 2


def test_what_the_kernels_cannot_take_is_refused() -> None:
    dims = [DIM_A, DIM_B]
    with _on("NVIDIA A100-SXM4-40GB", "gpu"):
        assert "not for NVIDIA A100" in fp8_matmul_gpu.obstacle(dims)
    assert "multiples of 64, not [96]" in fp8_matmul_gpu.obstacle([96])
    for kind in ("TPU v5p", "TPU v6 lite"):
        with _on(kind, "tpu"):
            assert f"not for {kind}" in fp8_matmul_tpu.obstacle()
    with pytest.raises(ValueError, match=r"multiples of 64, not \[96, "):
        jax.eval_shape(fp8_matmul_gpu.gmm_fp8, *_shapes("gmm_fp8", TILES * BLOCK, 96, DIM_B))
    for module in (fp8_matmul_gpu, fp8_matmul_tpu):
        shapes = _shapes("gmm_fp8", TILES * BLOCK, DIM_A, DIM_B, jnp.float8_e5m2)
        with pytest.raises(AssertionError, match="float8_e5m2"):
            jax.eval_shape(module.gmm_fp8, *shapes)
