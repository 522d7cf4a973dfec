"""SwiGLU experts by two grouped products, which TPU and GPU have kernels for, in any precision.

Rows are gathered into slots, and everything between the products is elementwise work on slots. Of
what lies in slots the first product's result alone is kept for the backward pass, which gathers
rows again.

Shapes: T rows, K choices per row, E experts, S slots = N tiles, D model dim, F hidden dim of an
expert, H = 2 F (gate and up side by side), A and B any dims.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops import grouped_loops, slots
from moe_jax.ops.fp8_recipes import Recipe
from moe_jax.ops.grouped_matmul import Experts, Tiles

# Rows that are summed together, and slots of their tiles.
SUM_ROWS, SUM_SIZE = 128, 64


class RowsTimesWeights(Protocol):
    """Each tile's rows times its expert's matrix: [S, B] in x's dtype, summed in float32.

    x_SA: [slots, A].
    w_EAB: [experts, A, B] in x's dtype; [experts, B, A] if `transpose_weights`.
    expert_of_tile_N: [tiles] int32, ascending over the used ones.
    used: [] int32, tiles in use, the first ones; others are not computed, and nobody reads them.
    """

    def __call__(
        self,
        x_SA: jax.Array,
        w_EAB: jax.Array,
        expert_of_tile_N: jax.Array,
        used: jax.Array,
        *,
        transpose_weights: bool = False,
    ) -> jax.Array: ...


class RowsTimesRows(Protocol):
    """x^T y over each expert's tiles: [E, A, B] float32.

    An expert without tiles gets zeros. Unused tiles may hold anything.
    """

    def __call__(
        self,
        x_SA: jax.Array,
        y_SB: jax.Array,
        expert_of_tile_N: jax.Array,
        used: jax.Array,
        num_experts: int,
    ) -> jax.Array: ...


class Products(NamedTuple):
    """What a backend provides.

    sum_of_slots: (y_SD, slot_of_TK) to [T, D] float32, as in `slots`.
    keep, restore: what lies in slots as it is kept for the backward pass, and as it was.
    empty_rows: how an empty slot is gathered, as in `_rows`.
    report: where products take a state of `fp8_state`, the three operands' reports of it.
    """

    gmm: RowsTimesWeights
    tgmm: RowsTimesRows
    sum_of_slots: Callable[[jax.Array, jax.Array], jax.Array]
    keep: Callable[[jax.Array], Any] = lambda x: x
    restore: Callable[[Any, jnp.dtype], jax.Array] = lambda kept, dtype: kept
    empty_rows: str = "clip"
    report: Callable[..., jax.Array] | None = None


@functools.cache
def products_of(backend: str, recipe: Recipe | None = None, form: str = "auto") -> Products:
    """Of a backend, whose kernels are imported where they are used.

    Args:
      form: of products by a recipe, see `fp8_native.kernels`.
    """
    if recipe is not None:
        from moe_jax.ops import fp8_experts  # which needs the names of this file

        dtype = jnp.dtype(jnp.float32) if backend == "portable" else None
        return fp8_experts.products(products_of(backend), recipe, dtype, form)
    if backend == "portable":
        return Products(grouped_loops.gmm, grouped_loops.tgmm, slots.sum_of_slots)
    if backend == "tpu":
        from moe_jax.ops import grouped_matmul_tpu

        gmm, tgmm = grouped_matmul_tpu.gmm, grouped_matmul_tpu.tgmm
        return Products(gmm, tgmm, functools.partial(sum_by_product, tgmm))
    from moe_jax.ops import grouped_matmul_gpu

    # XLA for GPUs gathers while it adds up.
    return Products(grouped_matmul_gpu.gmm, grouped_matmul_gpu.tgmm, slots.sum_of_slots)


class _Layout(NamedTuple):
    slot_of_TK: jax.Array  # the number of slots: nowhere
    choice_S: jax.Array  # the number of choices: empty
    expert_of_tile_N: jax.Array
    used: jax.Array

    @classmethod
    def of(cls, tiles: Tiles, num_tiles: int, size: int) -> "_Layout":
        num_slots = num_tiles * size
        slot_of_TK = jnp.where(tiles.slot_of_TK < 0, num_slots, tiles.slot_of_TK)
        choice_S = slots.choice_of_slot(slot_of_TK, num_slots)
        end_E = tiles.first_E + tiles.count_E
        tile_N1 = jnp.arange(num_tiles)[:, None]
        expert_of_tile_N = jnp.sum(tile_N1 >= end_E[:-1], axis=1, dtype=jnp.int32)
        return cls(slot_of_TK, choice_S, expert_of_tile_N, tiles.used)


def swiglu_experts(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts: Experts,
    tiles: Tiles,
    num_tiles: int,
    size: int,
    products: Products,
) -> jax.Array:
    """`grouped_matmul.swiglu_experts` by the products of a backend: [T, D] float32.

    The experts are float32, and so are their gradients, but hold values of x's dtype.
    """
    layout = _Layout.of(tiles, num_tiles, size)
    return _swiglu_experts(x_TD, weights_TK, experts, layout, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _swiglu_experts(x_TD, weights_TK, experts, layout, products):
    return _forward(x_TD, weights_TK, experts, layout, products)[0]


def _forward(x_TD, weights_TK, experts, layout, products):
    gate_up_EDH, down_EFD = (w.astype(x_TD.dtype) for w in experts[:2])
    gmm = functools.partial(_gmm, layout, products)
    x_SD, weight_S1 = _rows(x_TD, layout, products), _weights(weights_TK, layout)
    first, last = (None, None) if experts.state is None else experts.state
    opened_SH = gmm(x_SD, gate_up_EDH, state=first)
    # The name lets a rematerialization policy keep it.
    kept_SH = jax.tree.map(lambda a: checkpoint_name(a, "expert_gate_up"), products.keep(opened_SH))
    y_SD = gmm(_hidden(opened_SH, weight_S1), down_EFD, state=last)
    kept = x_TD, weights_TK, Experts(gate_up_EDH, down_EFD, experts.state), layout, kept_SH
    return products.sum_of_slots(y_SD, layout.slot_of_TK), kept


def _backward(products, kept, dy_TD):
    x_TD, weights_TK, experts, layout, kept_SH = kept
    gmm = functools.partial(_gmm, layout, products, transpose_weights=True)
    x_SD, dy_SD = (_rows(a.astype(x_TD.dtype), layout, products) for a in (x_TD, dy_TD))
    opened_SH = products.restore(kept_SH, x_TD.dtype)
    hidden_SF, pull_back = jax.vjp(_hidden, opened_SH, _weights(weights_TK, layout))
    first, last = (None, None) if experts.state is None else experts.state
    dopened_SH, dweight_S1 = pull_back(gmm(dy_SD, experts.down_EFD, state=last))
    dx_SD = gmm(dopened_SH, experts.gate_up_EDH, state=first)
    tgmm = functools.partial(_tgmm, layout, products, len(experts.down_EFD))
    d_experts = Experts(tgmm(x_SD, dopened_SH, state=first), tgmm(hidden_SF, dy_SD, state=last))
    if products.report is not None and experts.state is not None:
        of_both = (x_SD, experts.gate_up_EDH, dopened_SH), (hidden_SF, experts.down_EFD, dy_SD)
        reports = [
            products.report(*operands, state, layout.expert_of_tile_N, layout.used)
            for operands, state in zip(of_both, experts.state, strict=True)
        ]
        d_experts = d_experts._replace(state=jnp.stack(reports))
    dx_TD = products.sum_of_slots(dx_SD, layout.slot_of_TK).astype(x_TD.dtype)
    dweights_TK = slots.take(dweight_S1[:, 0], layout.slot_of_TK)
    return dx_TD, dweights_TK, d_experts, None


_swiglu_experts.defvjp(_forward, _backward)


def _hidden(opened_SH: jax.Array, weight_S1: jax.Array) -> jax.Array:
    """weight * silu(gate) * up, in float32 inside. The weight's gradient then needs no result."""
    # Split before it is widened, or the wide form of all is written out.
    gate, up = (half.astype(jnp.float32) for half in jnp.split(opened_SH, 2, axis=-1))
    return (weight_S1 * jax.nn.silu(gate) * up).astype(opened_SH.dtype)


def _rows(x_TD: jax.Array, layout: _Layout, products: Products) -> jax.Array:
    """The row of each slot, and any row ("clip") or zeros ("fill") in an empty one.

    A gate weight of zero keeps empty slots out of all gradients, and zeros would cost a pass more.
    But where slots share scales, any row would change those of others.
    """
    row_S = layout.choice_S // layout.slot_of_TK.shape[1]
    return x_TD.at[row_S].get(mode=products.empty_rows, fill_value=0)


def _weights(weights_TK: jax.Array, layout: _Layout) -> jax.Array:
    return slots.take(weights_TK.reshape(-1, 1), layout.choice_S)


def _gmm(layout, products, x, w, *, state, **options):
    if state is not None:
        options["state"] = state
    return products.gmm(x, w, layout.expert_of_tile_N, layout.used, **options)


def _tgmm(layout, products, num_experts, x, y, *, state):
    options = {} if state is None else {"state": state}
    return products.tgmm(x, y, layout.expert_of_tile_N, layout.used, num_experts, **options)


def sum_by_product(tgmm: RowsTimesRows, y_SD: jax.Array, slot_of_TK: jax.Array) -> jax.Array:
    """`slots.sum_of_slots` as a grouped product with ones: [T, D] float32.

    A gather of every choice of a row would write T * K rows, most of them for choices that are on
    other devices. Here the choices of each block of rows are gathered into tiles of their own.
    """
    (rows, top_k), num_slots = slot_of_TK.shape, len(y_SD)
    blocks = -(-rows // SUM_ROWS)
    num_tiles = min(num_slots, slot_of_TK.size) // SUM_SIZE + blocks
    layout = _Layout.of(_tiles_of_blocks(slot_of_TK < num_slots, blocks), num_tiles, SUM_SIZE)
    filled_S = layout.choice_S < slot_of_TK.size
    # Empty slots get what is in slot 0, which is a number: nobody wrote what is in unused tiles.
    gathered_SD = y_SD.at[slots.take(slot_of_TK.reshape(-1), layout.choice_S)].get(mode="clip")
    row_S = jnp.where(filled_S, layout.choice_S // top_k % SUM_ROWS, -1)
    ones_SR = (row_S[:, None] == jnp.arange(SUM_ROWS)).astype(y_SD.dtype)
    sum_BRD = tgmm(ones_SR, gathered_SD, layout.expert_of_tile_N, layout.used, blocks)
    return sum_BRD.reshape(blocks * SUM_ROWS, -1)[:rows]


def _tiles_of_blocks(here_TK: jax.Array, blocks: int) -> Tiles:
    """Tiles of the choices that are here, by blocks of rows, in which they stand in order."""
    padded = jnp.pad(here_TK, ((0, blocks * SUM_ROWS - len(here_TK)), (0, 0)))
    here_BC = padded.reshape(blocks, -1).astype(jnp.int32)
    rank_BC = jnp.cumsum(here_BC, axis=1) - here_BC
    count_B = (jnp.sum(here_BC, axis=1) + SUM_SIZE - 1) // SUM_SIZE
    first_B = jnp.cumsum(count_B) - count_B
    slot_BC = jnp.where(here_BC > 0, first_B[:, None] * SUM_SIZE + rank_BC, -1)
    return Tiles(slot_BC.reshape(padded.shape)[: len(here_TK)], first_B, count_B)
