"""A part of `benchmarks.gpu`: this device's matrix rate, and the speed of its grouped products.

On a GPU the products are our kernels. Elsewhere they are plain ones that do the same, so that the
program can be tried.

Shapes: S slots in N tiles, E experts, A and B the dims of an expert's matrix.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_shapes import CASES, MATRIX_DIM, ROUTINGS, Case, rows_of_experts
from benchmarks.timing import median_seconds
from moe_jax.ops import grouped_matmul_gpu
from moe_jax.ops.grouped_matmul_gpu import TILE_SIZE

Tiles = tuple[jax.Array, jax.Array]  # the expert of each tile, [N] int32; tiles used, [] int32


def matrix_rate(quick: bool) -> float:
    """Operations per second of a large square product in bfloat16."""
    dim = MATRIX_DIM[quick]
    a, b = (_normal(seed, (dim, dim)) for seed in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * dim**3 / median_seconds(lambda: product(a, b), jax.block_until_ready)


def plain_gmm(x_SA, w_EAB, expert_of_tile_N, used, *, transpose_weights=False):
    """`grouped_matmul_gpu.gmm` with a copy of the weights for each tile; zero in unused tiles."""
    w_NAB = w_EAB[expert_of_tile_N]
    w_NAB = w_NAB.swapaxes(1, 2) if transpose_weights else w_NAB
    x_NsA = x_SA.reshape(len(expert_of_tile_N), -1, x_SA.shape[1])
    y_NsB = _einsum("nsa,nab->nsb", x_NsA, w_NAB)
    y_NsB = jnp.where(jnp.arange(len(y_NsB))[:, None, None] < used, y_NsB, 0)
    return y_NsB.reshape(len(x_SA), -1).astype(x_SA.dtype)


def plain_tgmm(x_SA, y_SB, expert_of_tile_N, used, num_experts):
    """`grouped_matmul_gpu.tgmm` by a product for each tile."""
    tiles = len(expert_of_tile_N)
    x_NsA, y_NsB = (z.reshape(tiles, -1, z.shape[1]) for z in (x_SA, y_SB))
    w_NAB = _einsum("nsa,nsb->nab", x_NsA, y_NsB)
    # Unused tiles count for no expert.
    expert_of_tile_N = jnp.where(jnp.arange(tiles) < used, expert_of_tile_N, num_experts)
    return jax.ops.segment_sum(w_NAB, expert_of_tile_N, num_experts)


def products():
    """gmm and tgmm for this machine."""
    if jax.default_backend() == "gpu":
        return grouped_matmul_gpu.gmm, grouped_matmul_gpu.tgmm
    return plain_gmm, plain_tgmm


def tiles_of(rows_E: list[int], num_tiles: int) -> Tiles:
    """Each expert's rows in whole tiles, one expert after the other."""
    tiles_E = [-(-rows // TILE_SIZE) for rows in rows_E]
    expert_of_tile_N = np.full(num_tiles, len(rows_E) - 1, np.int32)
    used = sum(tiles_E)
    expert_of_tile_N[:used] = np.repeat(np.arange(len(rows_E)), tiles_E)
    return jnp.asarray(expert_of_tile_N), jnp.int32(used)


def measure(case: Case) -> list[dict]:
    """Seconds of each product of the case, and the operations that its rows need."""
    gmm, tgmm = products()
    num_tiles = case.rows // TILE_SIZE + case.experts
    results = []
    for name, (dim_a, dim_b) in case.products().items():
        x = _normal(0, (num_tiles * TILE_SIZE, dim_a))
        dy = _normal(1, (num_tiles * TILE_SIZE, dim_b))
        w = _normal(2, (case.experts, dim_a, dim_b))
        functions = {
            "forward": jax.jit(lambda x, dy, w, *tiles: gmm(x, w, *tiles)),
            "input gradient": jax.jit(
                lambda x, dy, w, *tiles: gmm(dy, w, *tiles, transpose_weights=True)
            ),
            "weight gradient": jax.jit(lambda x, dy, w, *tiles: tgmm(x, dy, *tiles, len(w))),
        }
        for routing in ROUTINGS:
            tiles = tiles_of(rows_of_experts(case, routing), num_tiles)
            for pass_, function in functions.items():
                call = functools.partial(function, x, dy, w, *tiles)
                seconds = median_seconds(call, jax.block_until_ready)
                operations = 2 * case.rows * dim_a * dim_b
                results.append(
                    {
                        "case": f"{case.name}, {case.experts} experts, {name}",
                        "routing": routing,
                        "pass": pass_,
                        "operations": operations,
                        "seconds": seconds,
                    }
                )
    return results


def _normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _einsum(equation, a, b):
    return jnp.einsum(
        equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def main() -> None:
    quick = "quick" in sys.argv[1:]
    results = [result for case in CASES[quick] for result in measure(case)]
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "rate": matrix_rate(quick), "products": results}))


if __name__ == "__main__":
    main()
