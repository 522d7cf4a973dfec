"""SwiGLU experts, each on the rows that chose it.

Choices lie sorted by expert in slots, and each expert's part is filled up to whole tiles of a few
slots, so that a tile is the work of one expert alone. An expert that nobody chose has no tile and
costs nothing, and the padding is less than a tile per expert whatever the routing.

This portable form loops over an expert's tiles, in pieces of 1024 slots, then of a quarter as many
and so on down to one tile. A piece's products run at the speed of dense ones. It gathers its own
rows, and weight gradients add up in place, so that of all that lies in slots only the first
product's result is kept for the backward pass.

Shapes: T rows, K choices per row, E experts, S slots (whole tiles), D model dim, F hidden dim of an
expert, H = 2 F (gate and up side by side).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops import fp8, slots
from moe_jax.ops.backends import PORTABLE, Backends
from moe_jax.ops.grouped_loops import dot, over_pieces, read, row_sum, write

# Of a tile by backend: the smallest, the largest, and how many would be enough for an expert. A
# matrix unit of a TPU wants long tiles; the GPU's kernels have blocks of this very size.
TILE_SIZES = {"portable": (8, 64, 16), "tpu": (128, 512, 32), "gpu": (128, 128, 1)}


class Experts(NamedTuple):
    """SwiGLU experts: first products side by side, and last ones.

    gate_up_EDH: [experts, model dim, 2 * hidden], gate first.
    down_EFD: [experts, hidden, model dim].
    state: [2, 3, WIDTH] of `fp8_state`, of the first products and of the last ones; None without.
    """

    gate_up_EDH: jax.Array
    down_EFD: jax.Array
    state: jax.Array | None = None


class Tiles(NamedTuple):
    """Where choices lie.

    slot_of_TK: [rows, top_k] int32, the slot of each choice; -1 for one that goes nowhere.
    first_E, count_E: [experts] int32, first tile and number of tiles of each expert.
    """

    slot_of_TK: jax.Array
    first_E: jax.Array
    count_E: jax.Array

    @property
    def used(self) -> jax.Array:
        """[] int32, the tiles of all experts."""
        return self.first_E[-1] + self.count_E[-1]

    def window(self, first_tile: jax.Array | int, num_tiles: int, size: int) -> "Tiles":
        """What lies in `num_tiles` tiles of `size` slots from `first_tile` on."""
        slot_of_TK = self.slot_of_TK - first_tile * size
        inside = (self.slot_of_TK >= 0) & (slot_of_TK >= 0) & (slot_of_TK < num_tiles * size)
        first_E = jnp.clip(self.first_E - first_tile, 0, num_tiles)
        end_E = jnp.clip(self.first_E + self.count_E - first_tile, 0, num_tiles)
        return Tiles(jnp.where(inside, slot_of_TK, -1), first_E, end_E - first_E)


def tile_size(balanced_load: float, backends: Backends = PORTABLE) -> int:
    """Slots of a tile for experts of so many rows each: small beside it, and a power of two.

    Of operands in eight bits a tile's slots share scales.
    """
    size, largest, tiles = TILE_SIZES[backends.grouped_matmul]
    if backends.recipe is not None:
        size, largest = max(size, fp8.TILE), max(largest, fp8.TILE)
    while size < largest and size * tiles < balanced_load:
        size *= 2
    return size


def make_tiles(expert_ids_TK: jax.Array, num_experts: int, size: int) -> Tiles:
    """Sorts choices by expert and, in an expert, by row; by counting, in linear time.

    Args:
      expert_ids_TK: [rows, top_k] int32; ids outside [0, num_experts) go nowhere.
      size: slots of a tile.
    """
    ids = expert_ids_TK.reshape(-1)
    rank, load_E = slots.ranks(ids, num_experts)
    count_E = (load_E + size - 1) // size
    first_E = jnp.cumsum(count_E) - count_E
    here = (ids >= 0) & (ids < num_experts)
    slot = first_E[jnp.where(here, ids, 0)] * size + rank
    slot_of_TK = jnp.where(here, slot, -1).reshape(expert_ids_TK.shape)
    return Tiles(checkpoint_name(slot_of_TK, "slots"), first_E, count_E)


def swiglu_experts(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts: Experts,
    tiles: Tiles,
    num_tiles: int,
    size: int,
    backends: Backends = PORTABLE,
) -> jax.Array:
    """The sum over a row's choices of down(weight * silu(gate(x)) * up(x)): [T, D] float32.

    Weights come in before the last product, so that their gradient needs no result.

    Args:
      x_TD: [rows, model dim].
      weights_TK: [rows, top_k] float32, the gate weights.
      experts: float32 of values that x's dtype holds, so that their gradients are float32.
      tiles: all within `num_tiles` tiles of `size` slots.
      backends: "portable" for the loop below, "tpu" or "gpu" for kernels; and a recipe, if any.
    """
    if backends.grouped_matmul != "portable" or backends.recipe is not None:
        from moe_jax.ops import grouped_kernels  # which needs the names of this file

        products = grouped_kernels.products_of(
            backends.grouped_matmul, backends.recipe, backends.fp8_form
        )
        return grouped_kernels.swiglu_experts(
            x_TD, weights_TK, experts, tiles, num_tiles, size, products
        )
    num_slots = num_tiles * size
    slot_of_TK = jnp.where(tiles.slot_of_TK < 0, num_slots, tiles.slot_of_TK)
    choice_S = slots.choice_of_slot(slot_of_TK, num_slots)
    layout = _Layout(slot_of_TK, choice_S, tiles.first_E, tiles.count_E)
    return _swiglu_experts(x_TD, weights_TK, experts, layout, size)


class _Layout(NamedTuple):
    slot_of_TK: jax.Array  # the number of slots: nowhere
    choice_S: jax.Array  # the number of choices: empty
    first_E: jax.Array
    count_E: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _swiglu_experts(x_TD, weights_TK, experts, layout, size):
    return _forward(x_TD, weights_TK, experts, layout, size)[0]


def _forward(x_TD, weights_TK, experts, layout, size):
    top_k, num_slots = weights_TK.shape[1], len(layout.choice_S)
    narrow = jax.tree.map(lambda w: w.astype(x_TD.dtype), experts)

    def piece(weights, start, rows, filled):
        y_SD, opened_SH = filled
        choice = read(layout.choice_S, start, rows)
        opened = slots.take(x_TD, choice // top_k) @ weights.gate_up_EDH
        gate, up = jnp.split(opened.astype(jnp.float32), 2, axis=-1)
        hidden = slots.take(weights_TK.reshape(-1, 1), choice) * jax.nn.silu(gate) * up
        y = hidden.astype(x_TD.dtype) @ weights.down_EFD
        return write(y_SD, y, start), write(opened_SH, opened, start)

    def expert(filled, inputs):
        weights, first, count = inputs
        step = functools.partial(piece, weights)
        return over_pieces(step, filled, first, count, size, num_slots), None

    widths = x_TD.shape[1], experts.gate_up_EDH.shape[2]
    filled = tuple(slots.zeros((num_slots, width), x_TD.dtype, x_TD) for width in widths)
    per_expert = narrow, layout.first_E, layout.count_E
    (y_SD, opened_SH), _ = jax.lax.scan(expert, filled, per_expert)
    # The name lets a rematerialization policy keep it; a loop's results have none of their own.
    opened_SH = checkpoint_name(opened_SH, "expert_gate_up")
    kept = (x_TD, weights_TK, narrow, layout, opened_SH)
    return slots.sum_of_slots(y_SD, layout.slot_of_TK), kept


def _backward(size, kept, dy_TD):
    x_TD, weights_TK, experts, layout, opened_SH = kept
    top_k, num_slots = weights_TK.shape[1], len(layout.choice_S)
    dtype = x_TD.dtype
    dy_TD = dy_TD.astype(dtype)

    def piece(weights, start, rows, filled):
        dx_SD, dweight_S1, d_experts = filled
        choice = read(layout.choice_S, start, rows)
        x, dy = slots.take(x_TD, choice // top_k), slots.take(dy_TD, choice // top_k)
        weight = slots.take(weights_TK.reshape(-1, 1), choice)
        gate, up = jnp.split(read(opened_SH, start, rows).astype(jnp.float32), 2, axis=-1)
        sigmoid = jax.nn.sigmoid(gate)
        hidden = gate * sigmoid * up
        dweighted = dot(dy, weights.down_EFD, 1, 1)
        dhidden = weight * dweighted
        dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        dopened = jnp.concatenate([dgate, dhidden * gate * sigmoid], axis=1).astype(dtype)
        return (
            write(dx_SD, dot(dopened, weights.gate_up_EDH, 1, 1), start),
            write(dweight_S1, jnp.sum(dweighted * hidden, axis=1, keepdims=True), start),
            Experts(
                d_experts.gate_up_EDH + row_sum(x, dopened),
                d_experts.down_EFD + row_sum((weight * hidden).astype(dtype), dy),
            ),
        )

    def expert(filled, inputs):
        weights, first, count = inputs
        none = jax.tree.map(lambda w: slots.zeros(w.shape, jnp.float32, x_TD), weights)
        step = functools.partial(piece, weights)
        *filled, d_experts = over_pieces(step, (*filled, none), first, count, size, num_slots)
        return tuple(filled), d_experts

    filled = (
        slots.zeros((num_slots, x_TD.shape[1]), dtype, x_TD),
        slots.zeros((num_slots, 1), jnp.float32, x_TD),
    )
    per_expert = experts, layout.first_E, layout.count_E
    (dx_SD, dweight_S1), d_experts = jax.lax.scan(expert, filled, per_expert)
    dx_TD = slots.sum_of_slots(dx_SD, layout.slot_of_TK).astype(dtype)
    dweights_TK = slots.take(dweight_S1[:, 0], layout.slot_of_TK)
    return dx_TD, dweights_TK, d_experts, None


_swiglu_experts.defvjp(_forward, _backward)
