"""Rows to other devices along a mesh axis and back, in rounds of bounded size.

Two back ends that differ in how a round's rows lie:

- `padded`: as many slots for each destination, exchanged by `all_to_all`. It runs everywhere.
- `ragged`: rows sorted by destination without gaps, exchanged by `ragged_all_to_all`, so that only
  rows travel, and a destination's buffer is shared by all sources. What a device sends lies in a
  buffer for all that it may send, whatever the factor. XLA has it for TPU and GPU.

Shapes: T tokens, K choices per token, n devices along the axis, C rows from a device to each other
on average, S slots of what is sent, R = n * C rows that a round brings to each device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moe_jax.ops import slots


class Round(NamedTuple):
    """One round of an exchange.

    slot_of_TK: [tokens, top_k] int32, the slot of each choice that travels in this round; num_slots
      for the others.
    num_slots: slots of what is sent.
    routes: arrays that say what goes where.
    move: (rows, routes, whether they go back) -> rows; it holds no arrays, so that a function with
      gradients of its own may hold it.
    """

    slot_of_TK: jax.Array
    num_slots: int
    routes: Any
    move: Callable[[jax.Array, Any, bool], jax.Array]

    def there(self, rows: jax.Array) -> jax.Array:
        """[S, ...] to [R, ...], zero where nothing came."""
        return self.move(rows, self.routes, False)

    def back(self, rows: jax.Array) -> jax.Array:
        """[R, ...] to [S, ...]."""
        return self.move(rows, self.routes, True)


class Exchange(Protocol):
    """A tree of integer arrays that says where choices go."""

    def rounds(self, capacity: int) -> jax.Array:
        """[] int32, how many rounds this device needs."""
        ...

    def one_round(self, number: jax.Array, capacity: int, axis: str) -> Round:
        """The round of this number, from 0 on; capacity is C."""
        ...


class Padded(NamedTuple):
    destination_TK: jax.Array
    rank_TK: jax.Array  # earlier choices with the same destination
    load_n: jax.Array

    def rounds(self, capacity: int) -> jax.Array:
        return _parts(jnp.max(self.load_n), capacity)

    def one_round(self, number: jax.Array, capacity: int, axis: str) -> Round:
        num_slots = len(self.load_n) * capacity
        place_TK = self.rank_TK - number * capacity
        here_TK = (self.destination_TK >= 0) & (place_TK >= 0) & (place_TK < capacity)
        slot_of_TK = jnp.where(here_TK, self.destination_TK * capacity + place_TK, num_slots)

        def move(rows, routes, returns):  # [n * C, ...] by destination to the same by source
            del routes, returns
            return jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=0, tiled=True)

        return Round(slot_of_TK, num_slots, (), move)


class Ragged(NamedTuple):
    destination_TK: jax.Array
    rank_TK: jax.Array
    load_nn: jax.Array  # [sources, destinations]

    def rounds(self, capacity: int) -> jax.Array:
        return _parts(jnp.max(jnp.sum(self.load_nn, axis=0)), len(self.load_nn) * capacity)

    def one_round(self, number: jax.Array, capacity: int, axis: str) -> Round:
        devices, here = len(self.load_nn), jax.lax.axis_index(axis)
        top_k = self.rank_TK.shape[1]
        received = devices * capacity
        sent = self.rank_TK.shape[0] * min(top_k, devices)  # all that this device may send
        # Rows for a destination, by source and rank, are numbered; a round takes R of them.
        first_nn = jnp.cumsum(self.load_nn, axis=0) - self.load_nn
        low_nn, high_nn = (
            jnp.clip(bound - first_nn, 0, self.load_nn)
            for bound in (number * received, (number + 1) * received)
        )
        count_nn = high_nn - low_nn
        at_source_nn = jnp.cumsum(self.load_nn, axis=1) - self.load_nn + low_nn
        # Of a source that sends nothing now it would lie outside of the buffer.
        at_destination_nn = jnp.clip(first_nn + low_nn - number * received, 0, received)
        there = _Chunks(
            at_source_nn[here], count_nn[here], at_destination_nn[here], count_nn[:, here]
        )
        back = _Chunks(
            at_destination_nn[:, here], count_nn[:, here], at_source_nn[:, here], count_nn[here]
        )
        destination_TK = jnp.maximum(self.destination_TK, 0)
        here_TK = (self.destination_TK >= 0) & (self.rank_TK >= low_nn[here][destination_TK])
        here_TK &= self.rank_TK < high_nn[here][destination_TK]
        first_n = (at_source_nn - low_nn)[here]
        slot_of_TK = jnp.where(here_TK, first_n[destination_TK] + self.rank_TK, sent)

        def move(rows: jax.Array, routes: Any, returns: bool) -> Any:
            there, back = routes
            if returns:
                return _move(rows, back, there, (sent, received), axis)
            return _move(rows, there, back, (received, sent), axis)

        return Round(slot_of_TK, sent, (there, back), move)


class _Chunks(NamedTuple):
    """What a device sends to and receives from each other, as `ragged_all_to_all` takes it: [n]."""

    at: jax.Array
    count: jax.Array
    to: jax.Array
    received: jax.Array


# The two ways are each other's transpose.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _move(rows: jax.Array, there: _Chunks, back: _Chunks, sizes: tuple[int, int], axis: str) -> Any:
    return _move_forward(rows, there, back, sizes, axis)[0]


# Not by way of `_move`, into which no rematerialization policy would see.
def _move_forward(rows, there, back, sizes, axis):
    target = slots.zeros((sizes[0], *rows.shape[1:]), rows.dtype, rows)
    moved = jax.lax.ragged_all_to_all(rows, target, *there, axis_name=axis)
    return moved, (there, back)


def _move_backward(sizes, axis, chunks, d_rows):
    there, back = chunks
    return _move(d_rows, back, there, sizes[::-1], axis), None, None


_move.defvjp(_move_forward, _move_backward)


def plan(destination_TK: jax.Array, axis: str, backend: str) -> Exchange:
    """Where choices go.

    Args:
      destination_TK: [tokens, top_k] int32, a device along the axis or -1; no device twice in a
        row.
      backend: "padded" or "ragged".
    """
    devices = jax.lax.axis_size(axis)
    rank_N, load_n = slots.ranks(destination_TK.reshape(-1), devices)
    rank_TK = rank_N.reshape(destination_TK.shape)
    if backend == "padded":
        return Padded(destination_TK, rank_TK, load_n)
    return Ragged(destination_TK, rank_TK, jax.lax.all_gather(load_n, axis))


def _parts(number: jax.Array, size: int) -> jax.Array:
    return (number + size - 1) // size
