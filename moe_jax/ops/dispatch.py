"""Sends tokens to the devices of their experts, applies the experts, and brings results back.

All of it runs inside a `shard_map` region, on one device's tokens and one device's experts. Each
expert gets a buffer of `capacity` slots on each source device. What does not fit goes in further
rounds inside the same compiled step, as many as the most loaded buffer of any device needs: skewed
routing is slow, never wrong, and takes no more memory. Nothing is dropped.

Equal buffers make the experts' products one batched product over experts, which runs at the speed
of a dense one on every platform.

Shapes: T tokens of this device, K experts per token, E experts, e experts of this device,
C capacity, S = E * C slots, D model dim, F hidden dim of an expert.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Experts(NamedTuple):
    """SwiGLU experts: gate, up [experts, model dim, hidden]; down [experts, hidden, model dim]."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


class Plan(NamedTuple):
    """Where each choice of each token goes.

    expert_ids_TK: [tokens, top_k] int32; the number of experts stands for "nowhere".
    rank_TK: [tokens, top_k] int32, how many earlier choices on this device took the same expert.
    rounds: [] int32, the same on all devices.
    """

    expert_ids_TK: jax.Array
    rank_TK: jax.Array
    rounds: jax.Array


def capacity(tokens: int, top_k: int, num_experts: int, buffer_factor: float) -> int:
    """Slots of one expert for one device's tokens: `buffer_factor` times a balanced load.

    Never more than the tokens that could choose it, never less than one.
    """
    return max(1, min(tokens, math.ceil(buffer_factor * tokens * top_k / num_experts)))


def make_plan(expert_ids_TK: jax.Array, num_experts: int, capacity: int, axes: tuple) -> Plan:
    """Ranks the choices of each expert in token order, by counting (no sort).

    Args:
      expert_ids_TK: [tokens, top_k] int32; ids outside [0, num_experts) go nowhere.
      num_experts: over all devices.
      capacity: slots of one expert in one round.
      axes: all mesh axes of the region; the number of rounds is the maximum over them.
    """
    ids = expert_ids_TK.reshape(-1, 1)
    one_hot = (ids == jnp.arange(num_experts)).astype(jnp.int32)
    counted = jnp.cumsum(one_hot, axis=0)
    rank = jnp.sum((counted - 1) * one_hot, axis=1)
    rounds = jax.lax.pmax((jnp.max(counted[-1]) + capacity - 1) // capacity, axes)
    nowhere = (expert_ids_TK < 0) | (expert_ids_TK >= num_experts)
    return Plan(
        jnp.where(nowhere, num_experts, expert_ids_TK), rank.reshape(expert_ids_TK.shape), rounds
    )


@jax.custom_vjp
def _to_slots(x_TD: jax.Array, token_of_slot_S: jax.Array, slot_of_TK: jax.Array) -> jax.Array:
    """[S, D]: the token of each slot; zero where the slot is empty (token T)."""
    del slot_of_TK
    return x_TD.at[token_of_slot_S].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _from_slots(y_SD: jax.Array, token_of_slot_S: jax.Array, slot_of_TK: jax.Array) -> jax.Array:
    """[T, D]: the sum of each token's slots, in float32 (slot S: not in this round)."""
    del token_of_slot_S
    slots_TKD = y_SD.at[slot_of_TK].get(mode="fill", fill_value=0)
    return jnp.sum(slots_TKD.astype(jnp.float32), axis=1).astype(y_SD.dtype)


# The two are each other's transpose, so that neither gradient is a scatter.
def _to_slots_forward(x, token_of_slot, slot_of):
    return _to_slots(x, token_of_slot, slot_of), (token_of_slot, slot_of)


def _to_slots_backward(indices, dy):
    return _from_slots(dy, *indices), None, None


def _from_slots_forward(y, token_of_slot, slot_of):
    return _from_slots(y, token_of_slot, slot_of), (token_of_slot, slot_of)


def _from_slots_backward(indices, dx):
    return _to_slots(dx, *indices), None, None


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)
_from_slots.defvjp(_from_slots_forward, _from_slots_backward)


def swiglu_experts(x_enD: jax.Array, experts: Experts) -> jax.Array:
    """down(silu(gate(x)) * up(x)) of each expert on its own rows: [experts, rows, model dim]."""
    gate = jnp.einsum("end,edf->enf", x_enD, experts.gate_EDF)
    up = jnp.einsum("end,edf->enf", x_enD, experts.up_EDF)
    return jnp.einsum("enf,efd->end", jax.nn.silu(gate) * up, experts.down_EFD)


def _round(number, x_TD, weights_TK, experts, plan, *, axes, capacity, combine_dtype):
    """The part of the result that round `number` brings: [T, D] `combine_dtype`."""
    tokens, top_k = plan.expert_ids_TK.shape
    devices = jax.lax.axis_size(axes)
    num_experts = devices * experts.gate_EDF.shape[0]
    num_slots = num_experts * capacity

    place_TK = plan.rank_TK - number * capacity
    here = (place_TK >= 0) & (place_TK < capacity) & (plan.expert_ids_TK < num_experts)
    slot_of_TK = jnp.where(here, plan.expert_ids_TK * capacity + place_TK, num_slots)
    choices = tokens * top_k
    choice_of_slot_S = jnp.full((num_slots,), choices, jnp.int32)
    choice_of_slot_S = choice_of_slot_S.at[slot_of_TK.reshape(-1)].set(
        jnp.arange(choices, dtype=jnp.int32), mode="drop"
    )
    token_of_slot_S = choice_of_slot_S // top_k

    def exchange(rows, inverse=False):
        """[E, C, ...] by destination <-> [e, devices, C, ...] by source."""
        local = experts.gate_EDF.shape[0]
        rest = rows.shape[-1]
        if inverse:
            rows = jnp.moveaxis(rows.reshape(local, devices, capacity, rest), 1, 0)
        else:
            rows = rows.reshape(devices, local, capacity, rest)
        rows = jax.lax.all_to_all(rows, axes, split_axis=0, concat_axis=0)
        if inverse:
            return rows.reshape(num_slots, rest)
        return jnp.moveaxis(rows, 0, 1).reshape(local, devices * capacity, rest)

    # Gate weights travel with their tokens and are applied there: the way back carries no weights,
    # and the backward pass sends each gradient once.
    sent_enD = exchange(_to_slots(x_TD, token_of_slot_S, slot_of_TK))
    gates_en1 = exchange(
        _to_slots(weights_TK.reshape(-1, 1), choice_of_slot_S, slot_of_TK.reshape(-1, 1))
    )
    out_enD = swiglu_experts(sent_enD, experts).astype(jnp.float32) * gates_en1
    back_SD = exchange(out_enD.astype(combine_dtype), inverse=True)
    return _from_slots(back_SD, token_of_slot_S, slot_of_TK)


def apply_experts(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts: Experts,
    plan: Plan,
    *,
    axes: tuple[str, ...],
    capacity: int,
    combine_dtype: jnp.dtype,
) -> jax.Array:
    """sum_k weights[t, k] * expert[expert_ids[t, k]](x[t]) for the tokens of this device.

    The gradient keeps the inputs and the plan only, and sends tokens again.

    Args:
      x_TD: [tokens, model dim].
      weights_TK: [tokens, top_k] float32.
      experts: this device's experts, in x's dtype. They must vary over all axes of the region
        (`jax.lax.pcast`), or each round would reduce their gradients over the mesh.
      plan: from `make_plan` with the same capacity.
      axes: the mesh axes that experts are split over.
      capacity: slots of one expert for one device's tokens.
      combine_dtype: of results on their way back; the sum over k is float32.
    Returns:
      [tokens, model dim] `combine_dtype`.
    """
    one_round = functools.partial(_round, axes=axes, capacity=capacity, combine_dtype=combine_dtype)

    def sum_rounds(function, plan):
        # The first round stands outside the loop, so that it can overlap with other work.
        def body(carry):
            number, total = carry
            return number + 1, jax.tree.map(jnp.add, total, function(number))

        first = function(jnp.zeros_like(plan.rounds))
        start = (jnp.ones_like(plan.rounds), first)
        return jax.lax.while_loop(lambda carry: carry[0] < plan.rounds, body, start)[1]

    @jax.custom_vjp
    def apply(x, weights, experts, plan):
        return sum_rounds(lambda number: one_round(number, x, weights, experts, plan), plan)

    def forward(x, weights, experts, plan):
        return apply(x, weights, experts, plan), (x, weights, experts, plan)

    def backward(kept, dy):
        x, weights, experts, plan = kept

        def gradients(number):
            _, pull_back = jax.vjp(
                lambda x, weights, experts: one_round(number, x, weights, experts, plan),
                x,
                weights,
                experts,
            )
            # Rounds add up in float32.
            return jax.tree.map(lambda gradient: gradient.astype(jnp.float32), pull_back(dy))

        total = sum_rounds(gradients, plan)
        inputs = (x, weights, experts)
        return *jax.tree.map(lambda g, like: g.astype(like.dtype), total, inputs), None

    apply.defvjp(forward, backward)
    return apply(x_TD, weights_TK, experts, plan)


def experts_reference(
    x_TD: jax.Array, weights_TK: jax.Array, expert_ids_TK: jax.Array, experts: Experts
) -> jax.Array:
    """The same by a dense loop: every expert on every token, unchosen ones weighted 0."""
    total = jnp.zeros(x_TD.shape, jnp.float32)
    for i in range(experts.gate_EDF.shape[0]):
        one = Experts(*(w[i : i + 1] for w in experts))
        gate_T1 = jnp.sum(jnp.where(expert_ids_TK == i, weights_TK, 0.0), axis=1, keepdims=True)
        total += gate_T1 * swiglu_experts(x_TD[None], one)[0].astype(jnp.float32)
    return total
