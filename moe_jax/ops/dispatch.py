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

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.ops import slots
from moe_jax.ops.backends import Backends
from moe_jax.ops.dispatch_round import Balanced, Inputs, Way, largest, one_round, route
from moe_jax.ops.grouped_matmul import Experts


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
    Returns:
      [tokens, model dim] `combine_dtype`; [] int32, how often the products ran.
    """
    way = Way(
        balanced._replace(tokens=balanced.tokens // parts),
        tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1),
        all_axes,
        combine_dtype,
        backends,
        parts,
    )
    routing, rounds = route(expert_ids_TK, experts, way)
    # What a custom gradient returns, no type says.
    result: Any = _apply((x_TD, weights_TK, experts), routing, rounds, way)
    return result


def _first(inputs: Inputs, routing: Any, way: Way) -> tuple[jax.Array, tuple[Any, ...]]:
    """The first round all along the way, and the number of rounds that each place behind needs."""

    def then(inputs, ids_TK, way):
        routing, rounds = route(ids_TK, inputs[2], way)
        y_TD, needed = _first(inputs, routing, way)
        return y_TD, (rounds, *needed)

    y_TD, needed = one_round(0, inputs, routing, way, then)
    return y_TD, largest(needed) if needed else ()


class _Rounds(NamedTuple):
    """Rounds of the first place on the way.

    inputs: experts are as narrow as tokens.
    stop: [] int32, their number.
    starts: of each place on the way the first round to run, [] int32; behind a round that is not
      round 0, all of them run.
    """

    inputs: Inputs
    routing: Any
    stop: jax.Array
    starts: list[jax.Array]


# The first round stands alone, so that it overlaps with other work, and what its gradient needs is
# kept as rematerialization has it. All others, at any place of the way, come behind it under one
# condition: a scheduler sets no exchange beside a condition that has exchanges in it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _apply(inputs, routing, rounds, way):
    return _apply_forward(inputs, routing, rounds, way)[0]


def _apply_forward(inputs, routing, rounds, way):
    y_TD, pull_back, behind = jax.vjp(lambda i: _first(i, routing, way), inputs, has_aux=True)
    needed, one = [rounds, *behind], jnp.ones((), jnp.int32)
    if all(type(number) is int for number in needed):
        return (y_TD, one), (pull_back, inputs[0], None)
    needed = _agreed(needed, way)
    more = jnp.any(jnp.stack(needed) > 1)
    # Where nothing is left to do behind the first round, the second comes next.
    starts = [jnp.all(jnp.stack([one, *needed[i + 1 :]]) <= 1) for i in range(len(needed))]
    starts = [start.astype(jnp.int32) for start in starts]
    rest = _Rounds(_narrow(inputs), routing, needed[0], starts)

    def further(first):
        y_TD, passes = _sum(rest, way)
        return first[0] + y_TD, first[1] + jax.lax.pmax(passes, way.all_axes)

    with jax.named_scope("further_rounds"):
        result = jax.lax.cond(more, further, lambda first: first, (y_TD, one))
    return result, (pull_back, inputs[0], (more, rest))


def _apply_backward(way, kept, d_result):
    pull_back, x_TD, further = kept
    gradients = _widened(pull_back(d_result[0])[0])
    if further is not None:
        more, rest = further
        with jax.named_scope("further_rounds"):
            gradients = jax.lax.cond(
                more,
                lambda first: jax.tree.map(jnp.add, first, _gradients(rest, way, d_result[0])),
                lambda first: first,
                gradients,
            )
    return _narrowed(gradients, x_TD), None, None


_apply.defvjp(_apply_forward, _apply_backward)


def _sum(rounds: _Rounds, way: Way) -> tuple[jax.Array, jax.Array]:
    """What they give, and how often the products ran."""
    x_TD = rounds.inputs[0]
    zero = slots.zeros(x_TD.shape, way.combine_dtype, x_TD), slots.zeros((), jnp.int32, x_TD)
    one = functools.partial(_further_round, rounds.inputs, rounds, way)
    return _loop(one, zero, rounds.starts[0], rounds.stop)


def _gradients(rounds: _Rounds, way: Way, dy_TD: jax.Array) -> Inputs:
    """Of the sum, float32. Each round is computed again."""
    inputs = rounds.inputs

    def of_round(number):
        def result(inputs):
            return _further_round(inputs, rounds, way, number)[0]

        return _widened(jax.vjp(result, _wide(inputs))[1](dy_TD)[0])

    zero = jax.tree.map(lambda a: slots.zeros(a.shape, jnp.float32, inputs[0]), inputs)
    return _loop(of_round, zero, rounds.starts[0], rounds.stop)


def _further_round(inputs, rounds, way, number):
    def then(inputs, ids_TK, way):
        routing, stop = route(ids_TK, inputs[2], way)
        if way.axes:
            (stop,) = _agreed([stop], way)
        starts = [jnp.where(number == 0, start, 0) for start in rounds.starts[1:]]
        result: Any = _further(inputs, routing, stop, starts, way)
        return result

    y_TD, passes = one_round(number, inputs, rounds.routing, way, then)
    return y_TD, largest(passes) if passes else slots.zeros((), jnp.int32, y_TD) + 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _further(inputs, routing, stop, starts, way):
    return _further_forward(inputs, routing, stop, starts, way)[0]


def _further_forward(inputs, routing, stop, starts, way):
    rounds = _Rounds(_narrow(inputs), routing, stop, starts)
    return _sum(rounds, way), rounds


def _further_backward(way, rounds, d_result):
    gradients = _gradients(rounds, way, d_result[0])
    return _narrowed(gradients, rounds.inputs[0]), None, None, None


_further.defvjp(_further_forward, _further_backward)


def _agreed(rounds: list[Any], way: Way) -> list[jax.Array]:
    """The largest of all devices."""
    return jax.lax.pmax([sharding.vary(jnp.int32(number)) for number in rounds], way.all_axes)


def _loop(function, zero, start, stop):
    """zero + function(start) + ... + function(stop - 1)."""

    def body(carry):
        number, total = carry
        return number + 1, jax.tree.map(jnp.add, total, function(number))

    return jax.lax.while_loop(lambda carry: carry[0] < stop, body, (start, zero))[1]


# Loops hold narrow experts and widen them inside, where that costs nothing; gradients add up wide.
def _narrow(inputs: Inputs) -> Inputs:
    x_TD, weights_TK, experts = inputs
    gate_up, down = (w.astype(x_TD.dtype) for w in experts[:2])
    return x_TD, weights_TK, experts._replace(gate_up_EDH=gate_up, down_EFD=down)


def _wide(inputs: Inputs) -> Inputs:
    x_TD, weights_TK, experts = inputs
    return x_TD, weights_TK, jax.tree.map(lambda w: w.astype(jnp.float32), experts)


def _widened(gradients: Inputs) -> Inputs:
    return jax.tree.map(lambda gradient: gradient.astype(jnp.float32), gradients)


def _narrowed(gradients: Inputs, x_TD: jax.Array) -> Inputs:
    dx_TD, d_weights_TK, d_experts = gradients
    return dx_TD.astype(x_TD.dtype), d_weights_TK, d_experts


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
