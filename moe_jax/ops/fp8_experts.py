"""Grouped products whose operands have eight bits (DeepSeek-V3, section 3.3).

As in `fp8_products`, each product quantises its own operands along the dim that it sums over. The
tiles along slots are of one expert each, since a tile of slots is (`grouped_matmul.tile_size`).

Shapes: S slots in N tiles, E experts, A and B any dims.
"""

import jax
import jax.numpy as jnp

from moe_jax.ops.fp8_recipes import KEPT, Recipe, Scaling
from moe_jax.ops.grouped_kernels import Products


def products(plain: Products, recipe: Recipe, dtype: jnp.dtype | None) -> Products:
    """The products of a backend on rounded operands.

    Args:
      dtype: of rounded operands, as the backend takes them; that of the given ones if None.
    """

    def rounded(x: jax.Array, scaling: Scaling, summed_dim: int, like: jnp.dtype) -> jax.Array:
        return scaling.rounded(x, summed_dim).astype(dtype or like)

    def readable(x: jax.Array, scaling: Scaling, tiles: jax.Array, used: jax.Array) -> jax.Array:
        """Nobody wrote what is in unused tiles; it must not scale what is in others."""
        if scaling.rows is not None:
            return x
        used_S1 = jnp.arange(len(x))[:, None] < used * (len(x) // len(tiles))
        return jnp.where(used_S1, x, jnp.zeros_like(x))

    def gmm(x_SA, w_EAB, expert_of_tile_N, used, *, transpose_weights=False):
        scaling = recipe.gradient if transpose_weights else recipe.activation
        x = rounded(readable(x_SA, scaling, expert_of_tile_N, used), scaling, 1, x_SA.dtype)
        w = rounded(w_EAB, recipe.weight, 2 if transpose_weights else 1, x_SA.dtype)
        y_SB = plain.gmm(x, w, expert_of_tile_N, used, transpose_weights=transpose_weights)
        return y_SB.astype(x_SA.dtype)

    def tgmm(x_SA, y_SB, expert_of_tile_N, used, num_experts):
        x, y = (
            rounded(readable(a, scaling, expert_of_tile_N, used), scaling, 0, a.dtype)
            for a, scaling in ((x_SA, recipe.activation), (y_SB, recipe.gradient))
        )
        return plain.tgmm(x, y, expert_of_tile_N, used, num_experts)

    return plain._replace(
        gmm=gmm,
        tgmm=tgmm,
        keep=lambda x: KEPT.quantize(x, 1),
        restore=lambda kept, dtype: KEPT.dequantize(kept, 1, dtype),
        empty_rows="fill",
    )
