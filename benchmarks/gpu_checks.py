"""A part of `benchmarks.gpu`: what this device computes, against references, with its gradients.

Errors are the largest difference, as a share of the largest value expected. A result in bfloat16
is rounded by up to 2^-8 of itself; one in float32 differs by the order of its sums.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_products, gpu_step
from moe_jax import config as configs
from moe_jax import sharding
from moe_jax.ops import attention
from moe_jax.ops.backends import choose
from moe_jax.ops.grouped_matmul_gpu import TILE_SIZE

NARROW, WIDE = 1e-2, 1e-3  # allowed of results in bfloat16 and in float32
# Several such results in a row; and routing may differ where two experts score nearly the same.
MODEL = 1e-1


def check(name: str, found: Any, expected: Any, allowed: float) -> dict:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    scale = max(np.max(np.abs(expected)), 1e-30)
    return record(name, float(np.max(np.abs(found - expected)) / scale), allowed)


def record(name: str, error: float, allowed: float) -> dict:
    return {"check": name, "error": error, "allowed": allowed, "passed": error <= allowed}


def products(quick: bool) -> list[dict]:
    """Grouped products with empty experts, one that has all, and dims that blocks do not divide."""
    experts, num_tiles = 4, 6
    dim_a, dim_b = (128, 64) if quick else (704, 1408)
    key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key[0], (num_tiles * TILE_SIZE, dim_a), jnp.bfloat16)
    y = jax.random.normal(key[1], (num_tiles * TILE_SIZE, dim_b), jnp.bfloat16)
    w = jax.random.normal(key[2], (experts, dim_a, dim_b), jnp.bfloat16)
    gmm, tgmm = gpu_products.products()
    plain_gmm, plain_tgmm = gpu_products.plain_gmm, gpu_products.plain_tgmm
    transposed = functools.partial(gmm, transpose_weights=True)
    plain_transposed = functools.partial(plain_gmm, transpose_weights=True)
    kinds = (
        ("forward", gmm, plain_gmm, (x, w)),
        ("input gradient", transposed, plain_transposed, (y, w)),
        ("weight gradient", tgmm, plain_tgmm, (x, y)),
    )
    results = []
    for tiles_of_expert in ((3, 0, 1, 1), (0, 6, 0, 0), (0, 0, 0, 0)):
        rows_E = [tiles * TILE_SIZE for tiles in tiles_of_expert]
        tiles = gpu_products.tiles_of(rows_E, num_tiles)
        for kind, function, reference, operands in kinds:
            of_weights = kind == "weight gradient"
            args = (*operands, *tiles, experts) if of_weights else (*operands, *tiles)
            static = len(args) - 1 if of_weights else ()
            found, expected = (
                jax.jit(f, static_argnums=static)(*args) for f in (function, reference)
            )
            # Nobody reads the rows that no tile uses.
            rows = experts if of_weights else sum(rows_E)
            if rows:
                name = f"grouped product, {kind}, tiles {tiles_of_expert}"
                allowed = WIDE if of_weights else NARROW
                results.append(check(name, found[:rows], expected[:rows], allowed))
    return results


def attentions(quick: bool) -> list[dict]:
    """Attention over documents, head dims 192 and 128, with its three gradients."""
    batch, length, heads = (1, 64, 2) if quick else (2, 1024, 4)
    key = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(key[i], (batch, length, heads, 192), jnp.bfloat16) for i in range(2))
    v, weights = (jax.random.normal(key[i], (batch, length, heads, 128)) for i in range(2, 4))
    v = v.astype(jnp.bfloat16)
    segment_ids = jnp.asarray(np.arange(length) * 3 // length + np.zeros((batch, 1)), jnp.int32)

    def run(function, *operands):
        def loss(*operands):
            out = function(*operands, segment_ids, 192**-0.5).astype(jnp.float32)
            return jnp.sum(out * weights), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*operands)
        return out, *gradients

    mesh = sharding.make_mesh(configs.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, sharding.BATCH)
        q, k, v, weights, segment_ids = jax.device_put((q, k, v, weights, segment_ids), rows)
        form = choose(configs.ModelConfig(), q.dtype).attention
        found = run(functools.partial(attention.attention, backend=form), q, k, v)
        with jax.default_matmul_precision("highest"):
            wide = (z.astype(jnp.float32) for z in (q, k, v))
            expected = run(attention.attention_reference, *wide)
    names = "forward", "query gradient", "key gradient", "value gradient"
    return [
        check(f"attention, {name}", a, b, 2 * NARROW)
        for name, a, b in zip(names, found, expected, strict=True)
    ]


def models(quick: bool) -> list[dict]:
    """A small model's first step, with this platform's forms of operations and with portable ones.

    Adam's first moment is then the gradient, but for a factor.
    """
    del quick  # small it is anyway
    shape = gpu_step.Step(2, 2, 256)

    def first_step(**backends):
        config = gpu_step.make_config(shape, small=True, **backends)
        state, metrics = gpu_step.TrainStep(config).run()
        moments = jax.tree.leaves(state["optimizer"]["mu"])
        return metrics["loss"], np.concatenate([np.asarray(m).ravel() for m in moments])

    loss, gradient = first_step()
    loss_0, gradient_0 = first_step(attention="portable", grouped_matmul="portable")
    error = float(np.linalg.norm(gradient - gradient_0) / np.linalg.norm(gradient_0))
    return [
        check("model, loss", loss, loss_0, NARROW),
        record("model, gradient (norm of the difference)", error, MODEL),
    ]


def main() -> None:
    quick = "quick" in sys.argv[1:]
    results = []
    for part in (products, attentions, models):
        try:
            results += part(quick)
        except Exception as error:  # the others are still worth knowing
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            results.append({"check": part.__name__, "error": message, "passed": False})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
