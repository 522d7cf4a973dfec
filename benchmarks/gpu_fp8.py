"""A part of `benchmarks.gpu`: products in eight bits (`fp8_block`), right first, then timed.

Times are of whole products: operands come in bfloat16 and are quantised in them. On a device
without kernels for eight bits the portable form runs, so that the program can be tried.

A floor is the greater of two: the operations over the rate of a large square product of the same
format, and the bytes of operands and result, in bfloat16 and each once, over the rate of a copy.

Shapes: T rows, A a weight's inputs, B its results, E experts.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_step
from benchmarks.gpu_checks import NARROW, check
from benchmarks.gpu_products import matrix_rate, tiles_of
from benchmarks.gpu_shapes import FP8_DENSE, FP8_GROUPED, FP8_ROWS, MATRIX_DIM
from benchmarks.timing import median_seconds
from configs import deepseek_v3
from moe_jax import config as configs
from moe_jax import sharding, validation
from moe_jax.ops import fp8_experts, grouped_kernels
from moe_jax.ops.backends import choose
from moe_jax.ops.fp8_products import Fp8Product
from moe_jax.ops.fp8_recipes import RECIPES
from moe_jax.ops.grouped_matmul_gpu import TILE_SIZE
from moe_jax.ops.weight_product import PLAIN, weight_product
from moe_jax.sharding import BATCH_AXES, P

RECIPE = RECIPES["fp8_block"]
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
PASSES = ("forward", "input gradient", "weight gradient")
FORMS = ("bf16", "auto")  # the last is of products in eight bits
Function = Callable[..., jax.Array]


def dense(form: str) -> list[Function]:
    """The three products of (x, w, dy): [T, A], [A, B], [T, B]; `form` is "bf16" or of FP8."""
    product = PLAIN if form == "bf16" else Fp8Product(RECIPE, form=form)

    def forward(x, w):
        return weight_product(x, w.astype(F32), 1, BF16, product)

    return [
        jax.jit(lambda x, w, dy: forward(x, w)),
        jax.jit(lambda x, w, dy: jax.vjp(lambda x: forward(x, w), x)[1](dy)[0]),
        jax.jit(lambda x, w, dy: jax.vjp(lambda w: forward(x, w.astype(BF16)), _wide(w))[1](dy)[0]),
    ]


def _wide(w: jax.Array) -> jax.Array:
    """So that its gradient is float32, as of a master weight."""
    return w.astype(F32)


def grouped(form: str, rows_E: list[int], num_tiles: int) -> list[Function]:
    """The same by experts: w is [E, A, B], and rows lie in tiles of one expert each."""
    products = grouped_kernels.products_of(choose(configs.ModelConfig(), BF16).grouped_matmul)
    if form != "bf16":
        dtype = F32 if jax.default_backend() == "cpu" else None
        products = fp8_experts.products(products, RECIPE, dtype, form)
    rows = P(BATCH_AXES)

    def on_device(function: Function) -> Function:
        def region(x, w, dy, tiles):
            return function(x, sharding.vary(w), dy, *(sharding.vary(a) for a in tiles))

        mapped = jax.shard_map(region, in_specs=(rows, P(), rows, P()), out_specs=rows)
        return jax.jit(lambda x, w, dy: mapped(x, w, dy, tiles_of(rows_E, num_tiles)))

    return [
        on_device(lambda x, w, dy, *tiles: products.gmm(x, w, *tiles)),
        on_device(lambda x, w, dy, *tiles: products.gmm(dy, w, *tiles, transpose_weights=True)),
        on_device(lambda x, w, dy, *tiles: products.tgmm(x, dy, *tiles, len(w))),
    ]


def operands(rows: int, *shape: int) -> list[jax.Array]:
    """x, w of this shape and dy, in bfloat16."""
    *_, inputs, results = shape
    shapes = (rows, inputs), shape, (rows, results)
    sizes = 1.0, inputs**-0.5, 1e-6
    specs = P(BATCH_AXES), P(), P(BATCH_AXES)
    return [
        jax.sharding.reshard(size * jax.random.normal(jax.random.key(i), s, BF16), spec)
        for i, (s, size, spec) in enumerate(zip(shapes, sizes, specs, strict=True))
    ]


def checks() -> list[dict]:
    """Against the portable form, which has the same operands and sums otherwise."""
    rows_E = [2 * TILE_SIZE, 0, TILE_SIZE]
    cases = {
        "dense": (dense, operands(384, 512, 384)),
        "grouped": (
            functools.partial(grouped, rows_E=rows_E, num_tiles=3),
            operands(384, 3, 512, 384),
        ),
    }
    results = []
    for name, (functions, inputs) in cases.items():
        both = zip(PASSES, functions("auto"), functions("portable"), strict=True)
        for pass_, found, expected in both:
            result, right = (np.asarray(f(*inputs), np.float64) for f in (found, expected))
            results.append(check(f"FP8 {name}, {pass_}", result, right, NARROW))
    return results


def fp8_rate(quick: bool) -> float:
    """Operations per second of a large square product of eight bits, by XLA's own."""
    dim = MATRIX_DIM[quick]
    a, b = (
        jax.random.normal(jax.random.key(i), (dim, dim), BF16).astype(jnp.float8_e4m3fn)
        for i in range(2)
    )
    product = jax.jit(lambda a, b: jax.lax.dot(a, b.T, preferred_element_type=BF16))
    return 2 * dim**3 / median_seconds(lambda: product(a, b), jax.block_until_ready)


def copy_rate(quick: bool) -> float:
    """Bytes per second, read and written, of a long pass over memory."""
    x = jnp.ones(2**20 if quick else 2**30, BF16)
    negate = jax.jit(jnp.negative)
    return 2 * x.nbytes / median_seconds(lambda: negate(x), jax.block_until_ready)


def timings(quick: bool, rates: dict[str, float]) -> list[dict]:
    """Seconds of each product in bf16 and in eight bits, and their floors."""
    rows = FP8_ROWS[quick]
    cases = [
        (f"dense {name}", dense, operands(rows, *dims)) for name, dims in FP8_DENSE[quick].items()
    ]
    for name, (experts, *dims) in FP8_GROUPED[quick].items():
        rows_E = [rows // experts] * experts
        function = functools.partial(
            grouped, rows_E=rows_E, num_tiles=sum(-(-r // TILE_SIZE) for r in rows_E)
        )
        cases.append((f"{experts} experts, {name}", function, operands(rows, experts, *dims)))
    results = []
    for name, functions, inputs in cases:
        x, _, dy = inputs
        operations = 2 * rows * x.shape[1] * dy.shape[1]
        moved = sum(a.nbytes for a in inputs)
        by_form = {form: functions(form) for form in FORMS}
        for i, pass_ in enumerate(PASSES):
            calls = {form: functools.partial(f[i], *inputs) for form, f in by_form.items()}
            seconds = {
                form: median_seconds(call, jax.block_until_ready) for form, call in calls.items()
            }
            floors = {
                form: max(operations / rate, moved / rates["copy"])
                for form, rate in zip(FORMS, (rates["bf16"], rates["fp8"]), strict=True)
            }
            results.append({"case": name, "pass": pass_, "seconds": seconds, "floors": floors})
    return results


def layer_step(quick: bool, rates: dict[str, float]) -> dict[str, Any]:
    """A train step of one of DeepSeek-V3's routed layers with eight experts, of which all are used.

    Its floor counts all operations at the rate of the form, though attention's own stay bf16.
    """
    seconds, operations = {}, 0.0
    for form, recipe in zip(FORMS, ("none", "fp8_block"), strict=True):
        raw = deepseek_v3.get_config("tiny" if quick else "full")
        raw.update_from_flattened_dict(_LAYER | {"precision.recipe": recipe})
        rows = FP8_ROWS[quick]
        raw.data.stages = ({"sequence_length": min(rows, 4096)},)
        raw.training.num_steps = 1
        raw.data.num_streams = 1
        raw.training.tokens_per_step = rows
        raw.mesh = configs.default_config().mesh
        step = gpu_step.TrainStep(validation.parse(raw))
        operations = step.operations
        run = lambda step=step: step.run()[1]["loss"]  # noqa: E731
        seconds[form] = median_seconds(run, jax.block_until_ready, calls=3)
        del step, run  # the next one needs its memory
    floors = {
        form: operations / rates[name] for form, name in zip(FORMS, ("bf16", "fp8"), strict=True)
    }
    return {"case": "a layer's step", "pass": "", "seconds": seconds, "floors": floors}


_LAYER = {
    "model.vocab_size": 1024,
    "model.num_hidden_layers": 1,
    "model.first_k_dense_replace": 0,
    "model.num_nextn_predict_layers": 0,
    "model.moe.num_experts": 8,
    "model.moe.num_experts_per_tok": 8,
    "model.moe.num_expert_groups": 1,
    "model.moe.num_limited_groups": 1,
    "training.micro_batches": 1,
    "training.rematerialization": "none",
}


def main() -> None:
    quick = "quick" in sys.argv[1:]
    mesh = sharding.make_mesh(configs.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        checked = checks()
        rates = {"bf16": matrix_rate(quick), "fp8": fp8_rate(quick), "copy": copy_rate(quick)}
        results = timings(quick, rates)
    results.append(layer_step(quick, rates))
    print(json.dumps({"checks": checked, "rates": rates, "times": results}))


if __name__ == "__main__":
    main()
