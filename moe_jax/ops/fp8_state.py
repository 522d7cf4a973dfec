"""What a product in eight bits remembers of its operands, and what it reports of them.

Its state is an array [3, WIDTH], a row each for activation, weight and gradient, whose cotangent is
no gradient but a report of the same shape: the backward pass sees all three operands. A report is
reduced over the mesh where it is made, and over micro-batches by `combined`.

State: columns of HISTORY hold the largest numbers of the last batches, the newest first, 0 where
there was none; column EXACT is 1 where operands are taken as they are. Report: largest number;
counts of numbers that saturated, that were flushed to zero, and of all; sums of squares of the
rounding's error and of the numbers; counts of scales by their exponents, in BINS.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.ops import fp8
from moe_jax.ops.fp8_recipes import Recipe, Scaling
from moe_jax.sharding import BATCH_AXES

Tree = Any

OPERANDS = ("activation", "weight", "gradient")
HISTORY, EXACT = 16, 16
BINS, BIN_EXPONENTS = 32, 8  # a bin covers so many powers of two
SUMS = 5  # columns behind the largest number and before the bins
WIDTH = 1 + SUMS + BINS


def first() -> jax.Array:
    """Before any batch."""
    return jnp.zeros((3, WIDTH), jnp.float32)


def operand(
    x: jax.Array, scaling: Scaling, summed_dim: int, state_W: jax.Array | None, recipe: Recipe
) -> jax.Array:
    """x as a product takes it, float32: rounded, unless the state has it exact."""
    if state_W is None:
        return scaling.rounded(x, summed_dim)
    rounded = scaling.rounded(x, summed_dim, _scales(x, scaling, summed_dim, state_W, recipe))
    return jnp.where(state_W[EXACT] > 0, x.astype(jnp.float32), rounded)


def _scales(
    x: jax.Array, scaling: Scaling, summed_dim: int, state_W: jax.Array, recipe: Recipe
) -> jax.Array:
    largest = fp8.largest(x, scaling.tile(x.ndim, summed_dim))
    if recipe.delayed:
        before = jnp.max(state_W[:HISTORY])
        largest = jnp.where(before > 0, before, largest)
    return scaling.scales_of(largest)


def report(
    x: jax.Array,
    scaling: Scaling,
    summed_dim: int,
    state_W: jax.Array,
    recipe: Recipe,
    *,
    whole: bool,
) -> jax.Array:
    """[WIDTH] of one device; of all but the largest number only if `whole`."""
    tile, x32 = scaling.tile(x.ndim, summed_dim), x.astype(jnp.float32)
    if not whole:
        return jnp.zeros_like(state_W).at[0].set(jnp.max(jnp.abs(x32)))
    scales = _scales(x, scaling, summed_dim, state_W, recipe)
    rounded = scaling.rounded(x, summed_dim, scales)
    most = float(jnp.finfo(scaling.dtype).max)
    # A number that is the largest of its tile may come out a little above by the division.
    beyond = jnp.abs(x32) > fp8.expand(scales, tile, x.shape) * most * (1 + 2.0**-20)
    sums = [
        jnp.sum(beyond, dtype=jnp.float32),
        jnp.sum((rounded == 0) & (x32 != 0), dtype=jnp.float32),
        jnp.float32(x.size),
        jnp.sum(jnp.square(rounded - x32)),
        jnp.sum(jnp.square(x32)),
    ]
    exponents = jnp.floor(jnp.log2(scales)).astype(jnp.int32).reshape(-1, 1)
    bin_N1 = jnp.clip(exponents // BIN_EXPONENTS + BINS // 2, 0, BINS - 1)
    filled_N1 = fp8.largest(x, tile).reshape(-1, 1) > 0  # scales of zeros say nothing
    bins = jnp.sum((bin_N1 == jnp.arange(BINS)) & filled_N1, axis=0, dtype=jnp.float32)
    return jnp.concatenate([jnp.max(jnp.abs(x32))[None], jnp.stack(sums), bins])


def of_operands(
    operands: Sequence[tuple[jax.Array, int]], state: jax.Array, recipe: Recipe, *, whole: bool
) -> jax.Array:
    """[3, WIDTH]: the reports of activation, weight and gradient, each with its summed dim."""
    scalings = recipe.activation, recipe.weight, recipe.gradient
    return jnp.stack(
        [
            report(x, scaling, summed_dim, state_W, recipe, whole=whole)
            for (x, summed_dim), scaling, state_W in zip(operands, scalings, state, strict=True)
        ]
    )


def over_devices(reports: jax.Array) -> jax.Array:
    """Inside a `shard_map`: [..., WIDTH] of all devices."""
    largest, sums = jnp.split(reports, [1], axis=-1)
    both = jax.lax.pmax(largest, BATCH_AXES), jax.lax.psum(sums, BATCH_AXES)
    return jnp.concatenate(both, axis=-1)


def combined(reports: Tree) -> Tree:
    """Over micro-batches, a leading dim of each array."""

    def combine(reports_M):
        largest, sums = jnp.split(reports_M, [1], axis=-1)
        return jnp.concatenate([jnp.max(largest, axis=0), jnp.sum(sums, axis=0)], axis=-1)

    return jax.tree.map(combine, reports)


def updated(state: Tree, reports: Tree, bound: float) -> Tree:
    """The state of the next batch.

    Args:
      bound: on the relative error of an operand; a product one of whose operands passes it takes
        them as they are from now on. 0: none does.
    """

    def update(state, report):
        history = jnp.concatenate([report[..., :1], state[..., : HISTORY - 1]], axis=-1)
        exact = state[..., EXACT]
        if bound:
            passed = jnp.any(relative_error(report) > bound, axis=-1, keepdims=True)
            exact = jnp.where(passed, 1.0, exact)
        rest = jnp.zeros_like(state[..., EXACT + 1 :])
        return jnp.concatenate([history, exact[..., None], rest], axis=-1)

    return jax.tree.map(update, state, reports)


def relative_error(report: jax.Array) -> jax.Array:
    """[...]: root of the squared error's share of the square, of reports [..., WIDTH]."""
    return jnp.sqrt(report[..., 4] / jnp.maximum(report[..., 5], jnp.finfo(jnp.float32).tiny))


def metrics(reports: Tree, state: Tree) -> dict[str, jax.Array]:
    """By layer and kind of operand, the worst of its products, and the range of their scales.

    "fp8/moe_blocks_2/gradient_flushed" and so on; `fp8_exact` is the number of products that take
    operands as they are. A scale's exponent is known to BIN_EXPONENTS.
    """
    found = {}
    for stack, tree in reports.items():
        reports = [leaf.reshape(len(leaf), -1, 3, WIDTH) for leaf in jax.tree.leaves(tree)]
        reports_PL3W = jnp.concatenate(reports, axis=1).swapaxes(0, 1)
        saturated, flushed, numbers = (reports_PL3W[..., i] for i in (1, 2, 3))
        numbers = jnp.maximum(numbers, 1.0)
        bins_L3B = jnp.sum(reports_PL3W[..., 1 + SUMS :], axis=0)
        lowest = jnp.argmax(bins_L3B > 0, axis=-1)
        highest = BINS - 1 - jnp.argmax(bins_L3B[..., ::-1] > 0, axis=-1)
        of_each = {
            "saturated": jnp.max(saturated / numbers, axis=0),
            "flushed": jnp.max(flushed / numbers, axis=0),
            "error": jnp.max(relative_error(reports_PL3W), axis=0),
            "least_scale_exponent": (lowest - BINS // 2) * BIN_EXPONENTS,
            "greatest_scale_exponent": (highest - BINS // 2 + 1) * BIN_EXPONENTS,
        }
        for what, of_layers in of_each.items():
            for layer, of_operands in enumerate(of_layers):
                for name, value in zip(OPERANDS, of_operands, strict=True):
                    found[f"fp8/{stack}_{layer}/{name}_{what}"] = value
    exact = [jnp.sum(jnp.any(s[..., EXACT] > 0, axis=-1)) for s in jax.tree.leaves(state)]
    return found | {"fp8_exact": sum(exact, start=jnp.zeros((), jnp.int32))}
