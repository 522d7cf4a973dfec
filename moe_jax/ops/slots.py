"""Rows into slots and back.

Each choice of a token has a slot or none. Places are found by counting, and both ways are gathers.

Shapes: T tokens, K choices per token, N = T * K choices, G groups, S slots, D dim of a row.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

CHUNK = 64


def ranks(group_N: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """How many earlier choices took the same group, [N] int32; how many took each, [G] int32.

    Earlier chunks are counted by group, and a chunk's own choices compared in pairs, so that no
    array of choices times groups is written.
    """
    chunks = -(-len(group_N) // CHUNK)
    padded = jnp.pad(group_N, (0, chunks * CHUNK - len(group_N)), constant_values=-1)
    group_NC = padded.reshape(chunks, CHUNK)
    chunk_N1 = jnp.arange(chunks)[:, None]
    # A negative index would count from the end.
    group_NC = jnp.where(group_NC < 0, num_groups, group_NC)
    load_NG = jnp.zeros_like(group_NC, shape=(chunks, num_groups))
    load_NG = load_NG.at[chunk_N1, group_NC].add(1, mode="drop")
    before_NG = jnp.cumsum(load_NG, axis=0) - load_NG
    earlier = jnp.tril(jnp.ones((CHUNK, CHUNK), bool), -1)
    same_NCC = group_NC[:, :, None] == group_NC[:, None, :]
    rank_NC = jnp.sum(same_NCC & earlier, axis=2, dtype=jnp.int32)
    rank_NC += before_NG.at[chunk_N1, group_NC].get(mode="fill", fill_value=0)
    return rank_NC.reshape(-1)[: len(group_N)], jnp.sum(load_NG, axis=0)


def choice_of_slot(slot_of_TK: jax.Array, slots: int) -> jax.Array:
    """[S] int32, the choice in each slot; T * K where it is empty."""
    choices = jnp.arange(slot_of_TK.size, dtype=jnp.int32)
    empty = jnp.full_like(slot_of_TK, slot_of_TK.size, shape=(slots,))
    return empty.at[slot_of_TK.reshape(-1)].set(choices, mode="drop")


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """The rows of x at these places; zero for a place behind the last."""
    return x.at[index].get(mode="fill", fill_value=0)


def zeros(shape: Sequence[int], dtype: DTypeLike, like: jax.Array) -> jax.Array:
    """That vary over the mesh as `like` does."""
    varying, nothing = tuple(jax.typeof(like).manual_axis_type.varying), jnp.zeros(shape, dtype)
    return jax.lax.pcast(nothing, varying, to="varying") if varying else nothing


def sum_of_slots(y_SD: jax.Array, slot_of_TK: jax.Array) -> jax.Array:
    """[T, D] float32, the sum of each token's slots (slot S: nowhere)."""
    # One choice after the other, so that no array of tokens times choices is written.
    rows = (take(y_SD, slot_of_T).astype(jnp.float32) for slot_of_T in slot_of_TK.T)
    return functools.reduce(jnp.add, rows)


@jax.custom_vjp
def to_slots(x_TD: jax.Array, token_of_slot_S: jax.Array, slot_of_TK: jax.Array) -> jax.Array:
    """[S, D]: the token of each slot; zero where the slot is empty (token T)."""
    del slot_of_TK
    return take(x_TD, token_of_slot_S)


@jax.custom_vjp
def from_slots(y_SD: jax.Array, token_of_slot_S: jax.Array, slot_of_TK: jax.Array) -> jax.Array:
    """[T, D]: the sum of each token's slots, in float32 (slot S: nowhere)."""
    del token_of_slot_S
    return sum_of_slots(y_SD, slot_of_TK).astype(y_SD.dtype)


# The two are each other's transpose, so that neither gradient is a scatter.
def _to_slots_forward(x, token_of_slot, slot_of):
    return to_slots(x, token_of_slot, slot_of), (token_of_slot, slot_of)


def _to_slots_backward(indices, dy):
    return from_slots(dy, *indices), None, None


def _from_slots_forward(y, token_of_slot, slot_of):
    return from_slots(y, token_of_slot, slot_of), (token_of_slot, slot_of)


def _from_slots_backward(indices, dx):
    return to_slots(dx, *indices), None, None


to_slots.defvjp(_to_slots_forward, _to_slots_backward)
from_slots.defvjp(_from_slots_forward, _from_slots_backward)
