"""Grouped products whose operands have eight bits (DeepSeek-V3, section 3.3).

As in `fp8_products`, each product quantises its own operands along the dim that it sums over. The
tiles along slots are of one expert each, since a tile of slots is (`grouped_matmul.tile_size`).

Shapes: S slots in N tiles, E experts, A and B any dims.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.ops import fp8_native
from moe_jax.ops.fp8_native import kernels, unless_exact
from moe_jax.ops.fp8_recipes import KEPT, Recipe, Scaling
from moe_jax.ops.fp8_state import of_operands, operand
from moe_jax.ops.grouped_kernels import Products


def products(
    plain: Products, recipe: Recipe, dtype: jnp.dtype | None, form: str = "auto"
) -> Products:
    """The products of a backend on rounded operands.

    Args:
      dtype: of rounded operands, as the backend takes them; that of the given ones if None.
      form: see `fp8_native.kernels`.
    """

    # Their scales are current: rows reach experts in rounds, whose order no history has.
    current = dataclasses.replace(recipe, delayed=False)

    def rounded(x, scaling, summed_dim, like, state_W):
        return operand(x, scaling, summed_dim, state_W, current).astype(dtype or like)

    def readable(x: jax.Array, scaling: Scaling, tiles: jax.Array, used: jax.Array) -> jax.Array:
        """Nobody wrote what is in unused tiles; it must not scale what is in others."""
        if scaling.rows is not None:
            return x
        return used_rows(x, tiles, used)

    def used_rows(x, tiles, used):
        used_S1 = jnp.arange(len(x))[:, None] < used * (len(x) // len(tiles))
        return jnp.where(used_S1, x, jnp.zeros_like(x))

    def row(state: jax.Array | None, number: int) -> jax.Array | None:
        return None if state is None else state[number]

    def gmm(x_SA, w_EAB, expert_of_tile_N, used, *, transpose_weights=False, state=None):
        tiles, options = (expert_of_tile_N, used), {"transpose_weights": transpose_weights}

        def portable():
            scaling, number = (recipe.gradient, 2) if transpose_weights else (recipe.activation, 0)
            x = readable(x_SA, scaling, *tiles)
            x = rounded(x, scaling, 1, x_SA.dtype, row(state, number))
            summed_dim = 2 if transpose_weights else 1
            w = rounded(w_EAB, recipe.weight, summed_dim, x_SA.dtype, row(state, 1))
            return plain.gmm(x, w, *tiles, **options).astype(x_SA.dtype)

        found = kernels(form, recipe, w_EAB.shape[1:])
        if found is None:
            return portable()
        native = functools.partial(fp8_native.gmm, found, recipe, x_SA, w_EAB, *tiles, **options)
        return unless_exact(native, portable, state)

    def tgmm(x_SA, y_SB, expert_of_tile_N, used, num_experts, *, state=None):
        tiles = expert_of_tile_N, used

        def portable():
            x = readable(x_SA, recipe.activation, *tiles)
            x = rounded(x, recipe.activation, 0, x_SA.dtype, row(state, 0))
            y = readable(y_SB, recipe.gradient, *tiles)
            y = rounded(y, recipe.gradient, 0, y_SB.dtype, row(state, 2))
            return plain.tgmm(x, y, *tiles, num_experts)

        found = kernels(form, recipe, (x_SA.shape[1], y_SB.shape[1]))
        if found is None:
            return portable()
        operands = x_SA, y_SB, *tiles, num_experts
        native = functools.partial(fp8_native.tgmm, found, recipe, *operands)
        return unless_exact(native, portable, state)

    def report(x_SA, w_EAB, dy_SB, state, expert_of_tile_N, used):
        x_SA, dy_SB = (used_rows(a, expert_of_tile_N, used) for a in (x_SA, dy_SB))
        return of_operands(((x_SA, 1), (w_EAB, 1), (dy_SB, 1)), state, current, whole=True)

    return plain._replace(
        gmm=gmm,
        tgmm=tgmm,
        keep=lambda x: KEPT.quantize(x, 1),
        restore=lambda kept, dtype: KEPT.dequantize(kept, 1, dtype),
        empty_rows="fill",
        report=report,
    )
