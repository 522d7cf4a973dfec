"""Sends tokens to the devices of their experts, applies the experts, and brings results back.

All of it runs inside a `shard_map` region, on one device's tokens and one device's experts. A token
travels once to each device that holds one of its experts, with the ids and gate weights of its
choices there. That device adds up what those experts give, and one row comes back. Over two mesh
axes a token goes once to each group of devices along the first, and there once to each device along
the second.

Buffers are bounded. What does not fit goes in further rounds inside the same compiled step, as many
as the fullest buffer of any device needs: skewed routing is slow, never wrong, and takes no more
memory. Nothing is dropped.

Shapes: T tokens of this device, K experts per token, n devices along an axis, C slots for each of
them, R = n * C rows that come from them, S slots of the grouped products, D model dim.
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


def apply_experts(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    expert_ids_TK: jax.Array,
    experts: Experts,
    balanced: Balanced,
    *,
    axes: tuple[str, ...],
    all_axes: tuple[str, ...],
    combine_dtype: jnp.dtype,
    backends: Backends,
    parts: int = 1,
    rare: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """sum_k weights[t, k] * expert[expert_ids[t, k]](x[t]) for the tokens of this device.

    Args:
      x_TD: [tokens, model dim].
      weights_TK: [tokens, top_k] float32.
      expert_ids_TK: [tokens, top_k] int32, among the experts along `axes`; others go nowhere.
      experts: this device's experts, float32 of values that x's dtype holds, so that their
        gradients are float32 (XLA takes widening and narrowing out again). They must vary over all
        axes of the region (`jax.lax.pcast`), or each round would reduce these over the mesh.
      balanced: of the tokens.
      axes: the mesh axes that experts are split over, the slowest first.
      all_axes: all mesh axes of the region, which agree on the number of rounds.
      combine_dtype: of results on their way back; a round's sums are float32 before.
      parts: that the tokens are cut in, equally. While one travels, experts work on another.
      rare: this is of a further round, whose own first one need not stand outside its loop.
    Returns:
      [tokens, model dim] `combine_dtype`; [] int32, how often the products ran.
    """
    axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    if not axes:
        return _apply_here(
            (x_TD, weights_TK, experts),
            expert_ids_TK,
            balanced,
            all_axes,
            combine_dtype,
            backends,
            rare,
        )
    axis, *inner_axes = axes
    devices = jax.lax.axis_size(axis)
    num_experts = len(experts.down_EFD) * jax.lax.axis_size(tuple(inner_axes))
    balanced = balanced._replace(tokens=balanced.tokens // parts)
    capacity = balanced.rows(num_experts)
    ids = jnp.split(expert_ids_TK, parts)
    plans = [
        exchange.plan(_destinations(ids_TK, num_experts, devices), axis, backends.exchange)
        for ids_TK in ids
    ]
    rounds = jnp.max(jnp.stack([plan.rounds(capacity) for plan in plans]))
    rounds = jax.lax.pmax(rounds, all_axes)

    def one_round(number, inputs, routing, rare):
        x_TD, weights_TK, experts = inputs

        def apply(x_RD, choices):
            ids_RK, gates_RK = jnp.split(choices, 2, axis=1)
            return apply_experts(
                x_RD,
                gates_RK,
                ids_RK.astype(jnp.int32) - 1 - jax.lax.axis_index(axis) * num_experts,
                experts,
                balanced._replace(tokens=balanced.tokens * devices),
                axes=tuple(inner_axes),
                all_axes=all_axes,
                combine_dtype=combine_dtype,
                backends=backends,
                rare=rare,
            )

        in_parts = jnp.split(x_TD, parts), jnp.split(weights_TK, parts)
        journeys = [
            _Journey.of(
                x_TD,
                weights_TK,
                ids_TK,
                plan.one_round(number, capacity, axis),
                in_fp8=backends.exchange_fp8,
            )
            for x_TD, weights_TK, ids_TK, plan in zip(*in_parts, *routing, strict=True)
        ]
        y_TD, passes = _in_turn(journeys, apply)
        return jnp.concatenate(y_TD), jnp.max(jnp.stack(passes))

    inputs, routing = (x_TD, weights_TK, experts), (ids, plans)
    return _sum_rounds(one_round, rounds, inputs, routing, all_axes, combine_dtype, rare)


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


def _apply_here(inputs, expert_ids_TK, balanced, all_axes, combine_dtype, backends, rare):
    """The same on one device that has all the experts in question."""
    num_experts, choices = len(inputs[2].down_EFD), expert_ids_TK.size
    load = balanced.choices(1)
    size = grouped_matmul.tile_size(load, backends)
    most = choices // size + min(choices, num_experts)
    wanted = math.ceil(balanced.buffer_factor * num_experts * load / size) + num_experts
    num_tiles = min(most, wanted)
    tiles = grouped_matmul.make_tiles(expert_ids_TK, num_experts, size)

    def one_round(number, inputs, tiles, rare):
        del rare
        x_TD, weights_TK, experts = inputs
        here = tiles.window(number * num_tiles, num_tiles, size)
        y_TD = grouped_matmul.swiglu_experts(
            x_TD, weights_TK, experts, here, num_tiles, size, backends
        )
        return y_TD.astype(combine_dtype), jnp.ones((), jnp.int32)

    if num_tiles == most:
        return one_round(0, inputs, tiles, rare)
    rounds = (tiles.used + num_tiles - 1) // num_tiles
    return _sum_rounds(one_round, rounds, inputs, tiles, all_axes, combine_dtype, rare)


def _destinations(expert_ids_TK: jax.Array, num_experts: int, devices: int) -> jax.Array:
    """The device of each choice; -1 where an earlier choice of the token goes there, or nowhere."""
    device_TK = jnp.where(expert_ids_TK < 0, devices, expert_ids_TK // num_experts)
    top_k = expert_ids_TK.shape[1]
    earlier = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    again_TK = jnp.any((device_TK[:, :, None] == device_TK[:, None, :]) & earlier, axis=2)
    return jnp.where(again_TK | (device_TK >= devices), -1, device_TK)


def _sum_rounds(
    one_round: Callable[[jax.Array, Any, Any, bool], tuple[jax.Array, jax.Array]],
    rounds: jax.Array,
    inputs: Any,
    routing: Any,
    all_axes: tuple[str, ...],
    combine_dtype: jnp.dtype,
    rare: bool,
) -> tuple[jax.Array, jax.Array]:
    """The sums of one_round(number, inputs, routing, rare) over the numbers of rounds.

    The second of the two is the largest of all devices.

    The first round stands outside the loop, so that it can overlap with other work, and what its
    gradient needs is kept as rematerialization has it. Others are computed again. Where all of this
    is rare, the loop has the first round too: a program must not double with each level.
    """

    @jax.custom_vjp
    def total(rounds, inputs, routing):
        return forward(rounds, inputs, routing)[0]

    def loop(function, first, rounds):
        """first + function(1) + function(2) ...; from 0 on where there is no first."""

        def body(carry):
            number, total = carry
            return number + 1, jax.tree.map(jnp.add, total, function(number))

        def further(start):
            return jax.lax.while_loop(lambda carry: carry[0] < rounds, body, start)

        with jax.named_scope("further_rounds"):
            if rare:
                return further((jnp.zeros_like(rounds), first))[1]
            # To a scheduler a loop is work, beside which it would set an exchange and nothing else.
            start = jnp.ones_like(rounds), first
            return jax.lax.cond(rounds > 1, further, lambda start: start, start)[1]

    # Loops hold narrow experts and widen them inside, where that costs nothing.
    def with_experts(inputs, dtype):
        x_TD, weights_TK, experts = inputs
        return x_TD, weights_TK, jax.tree.map(lambda w: w.astype(dtype), experts)

    def forward(rounds, inputs, routing):
        zero, x_TD, pull_back = jnp.zeros_like(rounds), inputs[0], None
        narrow = with_experts(inputs, x_TD.dtype)
        if rare:
            first = slots.zeros(x_TD.shape, combine_dtype, x_TD), zero
        else:
            first, pull_back = jax.vjp(lambda i: one_round(zero, i, routing, False), inputs)
        y, passes = loop(lambda number: one_round(number, narrow, routing, True), first, rounds)
        return (y, jax.lax.pmax(passes, all_axes)), (pull_back, rounds, narrow, routing)

    def backward(kept, dy):
        pull_back, rounds, narrow, routing = kept

        def gradients(number):
            inputs = with_experts(narrow, jnp.float32)
            return widen(jax.vjp(lambda i: one_round(number, i, routing, True), inputs)[1](dy)[0])

        def widen(tree):  # rounds add up in float32
            return jax.tree.map(lambda gradient: gradient.astype(jnp.float32), tree)

        if rare:
            first = jax.tree.map(lambda a: slots.zeros(a.shape, jnp.float32, a), narrow)
        else:
            first = widen(pull_back(dy)[0])
        dx, dweights, d_experts = loop(gradients, first, rounds)
        return None, (dx.astype(narrow[0].dtype), dweights, d_experts), None

    total.defvjp(forward, backward)
    return total(rounds, inputs, routing)


def experts_reference(
    x_TD: jax.Array, weights_TK: jax.Array, expert_ids_TK: jax.Array, experts: Experts
) -> jax.Array:
    """The same by a dense loop: every expert on every token, unchosen ones weighted 0."""
    total = jnp.zeros(x_TD.shape, jnp.float32)
    for i, (gate_up, down) in enumerate(zip(*experts[:2], strict=True)):
        gate, up = jnp.split(x_TD @ gate_up, 2, axis=-1)
        weight_T = jnp.sum(jnp.where(expert_ids_TK == i, weights_TK, 0.0), axis=1)
        y_TD = (jax.nn.silu(gate) * up) @ down
        total += weight_T[:, None] * y_TD.astype(jnp.float32)
    return total
