"""Errors of products in eight bits against float64, by recipe, product and data.

    python -m benchmarks.fp8_error [--json=PATH]

The portable form runs; native products have the same operands. Each of a layer's three products is
taken dense and grouped by experts, in bfloat16 and by each recipe, with operands that are

  gaussian: normal; weights and gradients as small as they are in training.
  heavy tails: of Student's t with 2 degrees of freedom.
  outliers: normal, but 100,000 times as large in one channel of each operand.

The error is the median of a product's errors over the median of its results, which one large
channel does not hide. Below stand signed errors: their mean over 1,000 random inputs in standard
errors, and for normal operands without signs, where nothing cancels, as a share of the results.

Shapes: T rows, A a weight's inputs, B its results, E experts.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from moe_jax.ops import fp8_experts, grouped_kernels
from moe_jax.ops.fp8_products import Fp8Product
from moe_jax.ops.fp8_recipes import RECIPES
from moe_jax.ops.weight_product import PLAIN

ROWS, INPUTS, RESULTS = 1024, 512, 384
TILES_OF_EXPERTS = (0, 0, 0, 1, 2, 2, 2, 2)  # of 128 rows; the fourth expert has none
EXPERTS = 4
SAMPLES = 1000
SAMPLE = 128, 160, 8  # rows, inputs and results
DATA = ("gaussian", "heavy tails", "outliers")
PRODUCTS = ("forward", "input gradient", "weight gradient")
NAMES = ("bf16", "fp8_block", "fp8_tensor", "mxfp8")
F32 = jnp.dtype(jnp.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    errors = {kind: {name: both_errors(name, kind) for name in NAMES} for kind in DATA}
    signed = {name: signed_errors(name) for name in NAMES}
    print("Median error, dense / grouped\n")
    print("| data | product |", " | ".join(NAMES), "|")
    print("|---|---|" + "---|" * len(NAMES))
    for kind, by_name in errors.items():
        for i, product in enumerate(PRODUCTS):
            cells = (" / ".join(f"{e[i]:.2%}" for e in by_name[name].values()) for name in NAMES)
            print(f"| {kind} | {product} |", " | ".join(cells), "|")
    print("\nMean signed error in standard errors; without signs, as a share of the results\n")
    print("| product |", " | ".join(NAMES), "|")
    print("|---|" + "---|" * len(NAMES))
    for i, product in enumerate(PRODUCTS):
        cells = (
            f"{signed[n]['both signs'][i]:+.1f}; {signed[n]['positive'][i]:+.3%}" for n in NAMES
        )
        print(f"| {product} |", " | ".join(cells), "|")
    record.save(flags.json, errors=errors, signed=signed)


def operands(kind: str, *experts: int) -> list[np.ndarray]:
    """x [T, A], w [*experts, A, B] and dy [T, B]."""
    rng = np.random.default_rng(0)
    shapes = (ROWS, INPUTS), (*experts, INPUTS, RESULTS), (ROWS, RESULTS)
    draw = rng.standard_normal if kind != "heavy tails" else lambda s: rng.standard_t(2, s)
    x, w, dy = (size * draw(s) for size, s in zip((1, 0.02, 1e-6), shapes, strict=True))
    if kind == "outliers":
        for a, channel in ((x, 5), (w, 200), (dy, 300)):
            a[..., channel] *= 1e5
    return [a.astype(np.float32) for a in (x, w, dy)]


def dense(name: str, x_TA: Any, w_AB: Any, dy_TB: Any) -> tuple[jax.Array, ...]:
    """The three products by a recipe, or in bfloat16."""
    if name == "bf16":
        x_TA, w_AB = (jnp.asarray(a, jnp.bfloat16) for a in (x_TA, w_AB))
    product = PLAIN if name == "bf16" else Fp8Product(RECIPES[name])
    y, pull_back = jax.vjp(lambda x, w: product(x, w.astype(F32), 1, F32, None), x_TA, w_AB)
    return y, *pull_back(dy_TB)


def grouped(name: str, x_TA: Any, w_EAB: Any, dy_TB: Any, tiles: Any) -> tuple[jax.Array, ...]:
    """The same; `tiles` has the expert of each tile of rows."""
    products = grouped_kernels.products_of("portable")
    if name == "bf16":
        x_TA, w_EAB, dy_TB = (jnp.asarray(a, jnp.bfloat16) for a in (x_TA, w_EAB, dy_TB))
    else:
        products = fp8_experts.products(products, RECIPES[name], F32)
    used = jnp.int32(len(tiles))
    dx_TA = products.gmm(dy_TB, w_EAB, tiles, used, transpose_weights=True)
    dw_EAB = products.tgmm(x_TA, dy_TB, tiles, used, len(w_EAB))
    return products.gmm(x_TA, w_EAB, tiles, used), dx_TA, dw_EAB


def exact(x_TA: np.ndarray, w_EAB: np.ndarray, dy_TB: np.ndarray, tiles: Any) -> list[np.ndarray]:
    """The grouped products in float64."""
    x_TA, w_EAB, dy_TB = (a.astype(np.float64) for a in (x_TA, w_EAB, dy_TB))
    expert_T = np.repeat(tiles, len(x_TA) // len(tiles))
    y, dx = np.zeros(dy_TB.shape), np.zeros(x_TA.shape)
    dw = np.zeros(w_EAB.shape)
    for i, w in enumerate(w_EAB):
        here = expert_T == i
        y[here], dx[here], dw[i] = x_TA[here] @ w, dy_TB[here] @ w.T, x_TA[here].T @ dy_TB[here]
    return [y, dx, dw]


def both_errors(name: str, kind: str) -> dict[str, list[float]]:
    """Of each product, dense and grouped."""
    x, w, dy = operands(kind)
    of_dense = jax.jit(lambda *a: dense(name, *a))(x, w, dy)
    tiles = np.array(TILES_OF_EXPERTS, np.int32)
    of_experts = operands(kind, EXPERTS)
    of_grouped = jax.jit(lambda *a: grouped(name, *a))(*of_experts, tiles)
    return {
        "dense": _medians(of_dense, exact(x, w[None], dy, [0])),
        "grouped": _medians(of_grouped, exact(*of_experts, tiles)),
    }


def _medians(results: Any, exact: list[np.ndarray]) -> list[float]:
    errors = (
        np.asarray(a, np.float64).reshape(b.shape) - b for a, b in zip(results, exact, strict=True)
    )
    return [
        # An expert without rows has zeros.
        float(np.median(np.abs(error[right != 0])) / np.median(np.abs(right[right != 0])))
        for error, right in zip(errors, exact, strict=True)
    ]


def signed_errors(name: str) -> dict[str, list[float]]:
    """Of each dense product."""
    rng, (rows, inputs, results) = np.random.default_rng(1), SAMPLE
    shapes = (rows, inputs), (inputs, results), (rows, results)
    normal = [rng.standard_normal((SAMPLES, *s)).astype(np.float32) for s in shapes]
    run = jax.jit(jax.vmap(lambda *a: dense(name, *a)))
    found = {}
    for sign, (x, w, dy) in (("both signs", normal), ("positive", [np.abs(a) for a in normal])):
        x64, w64, dy64 = (a.astype(np.float64) for a in (x, w, dy))
        right = x64 @ w64, dy64 @ w64.swapaxes(1, 2), x64.swapaxes(1, 2) @ dy64
        found[sign] = []
        for result, expected in zip(run(x, w, dy), right, strict=True):
            means = np.mean(np.asarray(result, np.float64) - expected, axis=(1, 2))
            error = np.std(means) / np.sqrt(len(means))
            whole = np.mean(expected) if sign == "positive" else error
            found[sign].append(float(np.mean(means) / whole))
    return found


if __name__ == "__main__":
    main()
