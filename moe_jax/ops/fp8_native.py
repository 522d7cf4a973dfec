"""Products by units that multiply eight bits, where the mesh's devices have such (`fp8_block`).

Operands are quantised here, with the summed dim last, as the kernels of `fp8_matmul_tpu.py` and
`fp8_matmul_gpu.py` want them.

Shapes: S slots in N tiles, E experts, A and B any dims.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import UserError
from moe_jax.ops.fp8_recipes import RECIPES, Recipe
from moe_jax.ops.fp8_state import EXACT

DENSE_TILE = {"gpu": 128, "tpu": 512}  # rows of a tile of what has no experts


def kernels(form: str, recipe: Recipe, dims: Sequence[int]) -> ModuleType | None:
    """Of the mesh's devices; None where operands are rounded and multiplied in another way.

    Args:
      form: "auto", "native" or "portable".
      dims: of the weight.
    Raises:
      UserError: "native" is wanted, and there is no such kernel.
    """
    if form == "portable":
        return None
    found, problem = _kernels(recipe, dims)
    if form == "native" and problem:
        raise UserError(
            f"products in config.precision.fp8_form='native' {problem}; 'portable' takes anything"
        )
    return None if problem else found


def _kernels(recipe: Recipe, dims: Sequence[int]) -> tuple[ModuleType | None, str | None]:
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = "cpu" if device is None else device.platform
    if recipe != RECIPES["fp8_block"]:
        return None, "have kernels for recipe='fp8_block' alone"
    # Imported where they are used: not every JAX has what the kernels import.
    if platform == "gpu":
        from moe_jax.ops import fp8_matmul_gpu

        return fp8_matmul_gpu, fp8_matmul_gpu.obstacle(dims)
    if platform == "tpu":
        from moe_jax.ops import fp8_matmul_tpu

        return fp8_matmul_tpu, fp8_matmul_tpu.obstacle()
    return None, f"have no kernels for {platform}"


def why_portable(form: str, recipe: Recipe) -> str | None:
    """Why no product by this recipe has a kernel on the mesh's devices; None if they may have."""
    if form == "portable":
        return "config.precision.fp8_form is 'portable'"
    problem = _kernels(recipe, ())[1]
    return problem and f"products in eight bits {problem}"


def unless_exact(
    native: Callable[[], Any], portable: Callable[[], Any], state: jax.Array | None
) -> Any:
    """One of the two: the kernels know no exact operands (`fp8_state`)."""
    if state is None:
        return native()
    return jax.lax.cond(jnp.any(state[:, EXACT] > 0), portable, native)


def gmm(
    found: ModuleType,
    recipe: Recipe,
    x_SA: jax.Array,
    w_EAB: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    *,
    transpose_weights: bool = False,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """See `grouped_kernels.RowsTimesWeights`; the operands are wide.

    Args:
      dtype: of the result; that of x if None.
    """
    x = (recipe.gradient if transpose_weights else recipe.activation).quantize(x_SA, 1)
    w = recipe.weight.quantize(w_EAB if transpose_weights else w_EAB.swapaxes(1, 2), 2)
    return found.gmm_fp8(*x, *w, expert_of_tile_N, used, dtype=dtype or x_SA.dtype)


def tgmm(
    found: ModuleType,
    recipe: Recipe,
    x_SA: jax.Array,
    y_SB: jax.Array,
    expert_of_tile_N: jax.Array,
    used: jax.Array,
    num_experts: int,
) -> jax.Array:
    """See `grouped_kernels.RowsTimesRows`; the operands are wide."""
    x, y = recipe.activation.quantize(x_SA.T, 1), recipe.gradient.quantize(y_SB.T, 1)
    return found.tgmm_fp8(*x, *y, expert_of_tile_N, used, num_experts)


def dense(
    found: ModuleType,
    recipe: Recipe,
    x_TA: jax.Array,
    weight_AB: jax.Array,
    dtype: jnp.dtype,
    *,
    transpose_weights: bool = False,
) -> jax.Array:
    """x times the weight, or its transpose: one expert that takes all rows."""
    rows = len(x_TA)
    x_SA, tiles = _in_tiles(x_TA)
    y_SB = gmm(
        found,
        recipe,
        x_SA,
        weight_AB[None],
        tiles,
        jnp.int32(len(tiles)),
        transpose_weights=transpose_weights,
        dtype=dtype,
    )
    return y_SB[:rows]


def dense_weights(
    found: ModuleType, recipe: Recipe, x_TA: jax.Array, dy_TB: jax.Array
) -> jax.Array:
    """The weight's gradient, [A, B] float32."""
    (x_SA, tiles), (dy_SB, _) = _in_tiles(x_TA), _in_tiles(dy_TB)
    return tgmm(found, recipe, x_SA, dy_SB, tiles, jnp.int32(len(tiles)), 1)[0]


def _in_tiles(x_TA: jax.Array) -> tuple[jax.Array, jax.Array]:
    """With zeros up to whole tiles; the expert of each tile, 0."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    size = DENSE_TILE[device.platform]
    tiles = -(-len(x_TA) // size)
    x_SA = jnp.pad(x_TA, ((0, tiles * size - len(x_TA)), (0, 0)))
    return x_SA, jnp.zeros((tiles,), jnp.int32)
