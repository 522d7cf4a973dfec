"""Grouped products whose operands have eight bits (DeepSeek-V3, section 3.3).

As in `fp8_products`, each product quantises its own operands along the dim that it sums over. The
tiles along slots are of one expert each, since a tile of slots is (`grouped_matmul.tile_size`).

Shapes: S slots in N tiles, E experts, A and B any dims.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.ops.fp8_recipes import KEPT, Recipe, Scaling
from moe_jax.ops.fp8_state import of_operands, operand
from moe_jax.ops.grouped_kernels import Products

NO_STATE = (None, None, None)


def products(plain: Products, recipe: Recipe, dtype: jnp.dtype | None) -> Products:
    """The products of a backend on rounded operands.

    Args:
      dtype: of rounded operands, as the backend takes them; that of the given ones if None.
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

    def gmm(x_SA, w_EAB, expert_of_tile_N, used, *, transpose_weights=False, state=NO_STATE):
        scaling, row = (recipe.gradient, 2) if transpose_weights else (recipe.activation, 0)
        x_SA = readable(x_SA, scaling, expert_of_tile_N, used)
        x = rounded(x_SA, scaling, 1, x_SA.dtype, state[row])
        w = rounded(w_EAB, recipe.weight, 2 if transpose_weights else 1, x_SA.dtype, state[1])
        y_SB = plain.gmm(x, w, expert_of_tile_N, used, transpose_weights=transpose_weights)
        return y_SB.astype(x_SA.dtype)

    def tgmm(x_SA, y_SB, expert_of_tile_N, used, num_experts, *, state=NO_STATE):
        scalings = (x_SA, recipe.activation, state[0]), (y_SB, recipe.gradient, state[2])
        x, y = (
            rounded(readable(a, scaling, expert_of_tile_N, used), scaling, 0, a.dtype, state_W)
            for a, scaling, state_W in scalings
        )
        return plain.tgmm(x, y, expert_of_tile_N, used, num_experts)

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
