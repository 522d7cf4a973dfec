"""One round of dispatch: tokens to the devices of their experts along one axis, and back.

Each travels with the ids and gate weights of its choices there. What happens at the other end, the
caller says: tokens go on along another axis, or experts are there.

Shapes: T tokens of this device, K experts per token, n devices along an axis, C slots for each of
them, R = n * C rows that come from them, S slots of what is sent, D model dim.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops import exchange, grouped_matmul, slots
from moe_jax.ops.backends import Backends
from moe_jax.ops.fp8_exchange import in_eight_bits
from moe_jax.ops.grouped_matmul import Experts


class Balanced(NamedTuple):
    """What sizes the buffers: balanced routing, times a factor.

    A token chooses `limited_groups` of the groups of experts, and `top_k` of the experts in these.
    """

    tokens: int  # of the devices whose tokens have been brought together
    top_k: int
    num_experts: int
    buffer_factor: float
    num_groups: int = 1
    limited_groups: int = 1

    def rows(self, experts: int) -> int:
        """Buffer for the tokens with a choice among so many of the experts."""
        wanted = math.ceil(self.buffer_factor * self.tokens * self.share(experts))
        return max(1, min(self.tokens, wanted))

    def share(self, experts: int) -> float:
        """The share of tokens with a choice among so many neighbouring experts.

        Args:
          experts: a part of a group, or of several groups, which then count as whole.
        """
        groups, chosen = self.num_groups, self.limited_groups
        size = self.num_experts // groups
        here, of_group = -(-experts // size), min(experts, size)
        missed = sum(
            # Of the chosen groups, so many are here.
            math.comb(here, met)
            * math.comb(groups - here, chosen - met)
            * math.comb(chosen * size - met * of_group, self.top_k)
            for met in range(max(0, chosen - groups + here), min(here, chosen) + 1)
        )
        return 1 - missed / math.comb(groups, chosen) / math.comb(chosen * size, self.top_k)

    def choices(self, experts: int) -> float:
        """Choices of so many of the experts, on average."""
        return self.tokens * self.top_k * experts / self.num_experts


class Way(NamedTuple):
    """How tokens come to their experts, from this place on; it holds no arrays.

    balanced: of the tokens of a part.
    axes: along each of which tokens go to the devices of their experts. Without any, all experts
      in question are here.
    all_axes, combine_dtype, backends, parts: see `dispatch.apply_experts`.
    """

    balanced: Balanced
    axes: tuple[str, ...]
    all_axes: tuple[str, ...]
    combine_dtype: jnp.dtype
    backends: Backends
    parts: int = 1

    def behind(self) -> "Way":
        """What is left of it at the other end of the first axis."""
        axis, *axes = self.axes
        tokens = self.balanced.tokens * jax.lax.axis_size(axis)
        balanced = self.balanced._replace(tokens=tokens)
        return self._replace(balanced=balanced, axes=tuple(axes), parts=1)


# Tokens [T, D], their gate weights [T, K], and experts.
Inputs = tuple[jax.Array, jax.Array, Experts]


def route(expert_ids_TK: jax.Array, experts: Experts, way: Way) -> tuple[Any, Any]:
    """Where choices go next, and in how many rounds; the number 1 where they cannot be more."""
    if not way.axes:
        size, num_tiles, most = _tiles_of_a_round(expert_ids_TK.size, experts, way)
        tiles = grouped_matmul.make_tiles(expert_ids_TK, len(experts.down_EFD), size)
        return tiles, 1 if num_tiles == most else (tiles.used + num_tiles - 1) // num_tiles
    axis = way.axes[0]
    num_experts, devices = _experts_behind(experts, way), jax.lax.axis_size(axis)
    ids = jnp.split(expert_ids_TK, way.parts)
    plans = [
        exchange.plan(_destinations(ids_TK, num_experts, devices), axis, way.backends.exchange)
        for ids_TK in ids
    ]
    capacity = way.balanced.rows(num_experts)
    rounds = [plan.rounds(capacity) for plan in plans]
    return (ids, plans), 1 if capacity == way.balanced.tokens else largest(rounds)


def one_round(
    number: jax.Array | int,
    inputs: Inputs,
    routing: Any,
    way: Way,
    then: Callable[[Inputs, jax.Array, Way], tuple[jax.Array, Any]],
) -> tuple[jax.Array, list[Any]]:
    """What experts give to the choices of this round: [T, D] `combine_dtype`.

    Args:
      then: of inputs and the ids of their choices, on the way that is left; what else it gives is
        returned for each part.
    """
    x_TD, weights_TK, experts = inputs
    if not way.axes:
        size, num_tiles, _ = _tiles_of_a_round(weights_TK.size, experts, way)
        tiles = routing.window(number * num_tiles, num_tiles, size)
        y_TD = grouped_matmul.swiglu_experts(
            x_TD, weights_TK, experts, tiles, num_tiles, size, way.backends
        )
        return y_TD.astype(way.combine_dtype), []
    axis, num_experts = way.axes[0], _experts_behind(experts, way)
    capacity = way.balanced.rows(num_experts)

    def apply(x_RD, choices):
        ids_RK, gates_RK = jnp.split(choices, 2, axis=1)
        ids_RK = ids_RK.astype(jnp.int32) - 1 - jax.lax.axis_index(axis) * num_experts
        return then((x_RD, gates_RK, experts), ids_RK, way.behind())

    in_parts = jnp.split(x_TD, way.parts), jnp.split(weights_TK, way.parts)
    journeys = [
        _Journey.of(
            x_TD,
            weights_TK,
            ids_TK,
            plan.one_round(number, capacity, axis),
            in_fp8=way.backends.exchange_fp8,
        )
        for x_TD, weights_TK, ids_TK, plan in zip(*in_parts, *routing, strict=True)
    ]
    y_TD, others = _in_turn(journeys, apply)
    return jnp.concatenate(y_TD), others


def _experts_behind(experts: Experts, way: Way) -> int:
    """Experts of a device along the first axis and those behind it."""
    return len(experts.down_EFD) * jax.lax.axis_size(way.axes[1:])


def _tiles_of_a_round(choices: int, experts: Experts, way: Way) -> tuple[int, int, int]:
    """Slots of a tile, tiles of a round, and the most that these choices can fill."""
    num_experts, load = len(experts.down_EFD), way.balanced.choices(1)
    size = grouped_matmul.tile_size(load, way.backends)
    most = choices // size + min(choices, num_experts)
    wanted = math.ceil(way.balanced.buffer_factor * num_experts * load / size) + num_experts
    return size, min(most, wanted), most


def largest(values: list[Any]) -> Any:
    """Of each place of these trees of numbers."""
    return jax.tree.map(lambda *x: x[0] if type(x[0]) is int else jnp.max(jnp.stack(x)), *values)


def _destinations(expert_ids_TK: jax.Array, num_experts: int, devices: int) -> jax.Array:
    """The device of each choice; -1 where an earlier choice of the token goes there, or nowhere."""
    device_TK = jnp.where(expert_ids_TK < 0, devices, expert_ids_TK // num_experts)
    top_k = expert_ids_TK.shape[1]
    earlier = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    again_TK = jnp.any((device_TK[:, :, None] == device_TK[:, None, :]) & earlier, axis=2)
    return jnp.where(again_TK | (device_TK >= devices), -1, device_TK)


class _Journey(NamedTuple):
    """Tokens on their way to the devices of their experts and back.

    sent: rows [S, D], and the ids and gate weights of their choices.
    rows: the way of rows and results, which may be in eight bits.
    """

    sent: tuple[jax.Array, jax.Array]
    token_of_slot_S: jax.Array
    round: exchange.Round
    rows: exchange.Round

    @classmethod
    def of(
        cls, x_TD, weights_TK, expert_ids_TK, round: exchange.Round, *, in_fp8: bool
    ) -> "_Journey":
        token_of_slot_S = slots.choice_of_slot(round.slot_of_TK, round.num_slots)
        token_of_slot_S //= expert_ids_TK.shape[1]
        # One message, of float32, which is exact for ids; 0 is none, as where nothing comes.
        ids_SK = slots.take(expert_ids_TK + 1, token_of_slot_S)
        gates_SK = slots.to_slots(weights_TK, token_of_slot_S, round.slot_of_TK)
        choices = jnp.concatenate([ids_SK.astype(jnp.float32), gates_SK], axis=1)
        x_SD = slots.to_slots(x_TD, token_of_slot_S, round.slot_of_TK)
        rows = in_eight_bits(round) if in_fp8 else round
        return cls((x_SD, choices), token_of_slot_S, round, rows)

    def there(self, sent: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return self.rows.there(sent[0]), self.round.there(sent[1])

    def summed(self, y_SD: jax.Array) -> jax.Array:
        return slots.from_slots(y_SD, self.token_of_slot_S, self.round.slot_of_TK)


def _in_turn(
    journeys: list[_Journey], apply: Callable[..., tuple[jax.Array, jax.Array]]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Results [T, D] of each journey, and what else `apply` gives of each.

    Time goes in steps: experts work on the tokens of one journey, while those of the next come and
    results of the last go back. Barriers end a step, in the backward pass as well; a scheduler that
    is left to itself has exchanges wait for each other, with nothing beside them.
    """
    arrived, applied, returned, passes = journeys[0].there(journeys[0].sent), None, [], []
    for i in range(len(journeys)):
        following = journeys[i + 1] if i + 1 < len(journeys) else None
        sent = following.sent if following else None
        arrived, sent, applied, returned = jax.lax.optimization_barrier(
            (arrived, sent, applied, returned)
        )
        working, number = apply(*arrived)
        passes.append(number)
        if following:
            arrived = following.there(sent)
        if applied is not None:
            returned.append(journeys[i - 1].rows.back(applied))
        applied = working
    applied, returned = jax.lax.optimization_barrier((applied, returned))
    returned.append(journeys[-1].rows.back(applied))
    return [j.summed(y_SD) for j, y_SD in zip(journeys, returned, strict=True)], passes
