"""Bytes that leave a device in a train step, by kind and by the mesh axes they travel along.

As in `compiled.py`, no byte is counted twice on its way: (n - 1) / n of what an all-to-all or a
reduce-scatter over n devices is given, n - 1 parts of an all-gather, twice a reduce-scatter's for
an all-reduce. Not counted are the routing's statistics, a few numbers per expert.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from moe_jax import sharding
from moe_jax.config import BACKENDS, MoEConfig
from moe_jax.ops.dispatch import Balanced
from moe_jax.planning.case import Case
from moe_jax.planning.machines import Topology
from moe_jax.planning.weights import Weight
from moe_jax.sharding import BATCH_AXES, DEVICE_ORDER, EXPERT_AXES

FLOAT32 = INT32 = 4
EXCHANGES = ("dispatch", "combine")


class Transfer(NamedTuple):
    """What one kind of communication sends.

    kind: "dispatch" and "combine" (tokens to their experts' devices and back, gradients too),
      "weight gathers", "gradient scatters", "gradient all-reduce", "embedding".
    axes: the mesh axes along which it goes.
    collective: as XLA calls it.
    bytes: that leave a device in a step.
    """

    kind: str
    axes: tuple[str, ...]
    collective: str
    bytes: float


def transfers(case: Case) -> list[Transfer]:
    """Of a whole step, alike ones as one; only what goes to other devices."""
    total: dict[tuple[str, tuple[str, ...], str], float] = {}
    for kind, axes, collective, sent in _of_micro_batch(case):
        axes = tuple(axis for axis in DEVICE_ORDER if axis in axes and case.sizes[axis] > 1)
        if axes:
            key = kind, axes, collective
            total[key] = total.get(key, 0.0) + sent * case.micro_batches
    return [Transfer(*key, sent) for key, sent in total.items()]


def _of_micro_batch(case: Case) -> Iterator[Transfer]:
    for weight in case.weights:
        if weight.trained:
            yield from _of_weight(case, weight)
    yield from _of_embedding(case)
    if case.routed_layers:
        yield from _of_exchange(case)


def _of_weight(case: Case, weight: Weight) -> Iterator[Transfer]:
    """Its parts are gathered in a layer's forward and backward pass, and its gradient is summed.

    The head, or a table that is the head too, is gathered once in a step, since no layer's memory
    is at stake; each loss has a gradient of it, and so has each look-up of the table. The table
    itself stays in parts.
    """
    split, losses = weight.split_over(case.sizes), 1 + case.depth
    gathered = weight.gathered_over(case.sizes)
    others = tuple(axis for axis in BATCH_AXES if axis not in split)
    parts, copies = (sharding.num_shards(dict(case.sizes), axes) for axes in (gathered, others))
    # XLA makes no loop of a single layer, and merges what both of its passes gather.
    passes = 1.0 if weight.stack and weight.layers == 1 else 2.0
    part, losses_of, look_ups = weight.part(case.sizes), 1, 0
    if weight.group == "head" or weight.group == "embedding":
        is_head = weight.group == "head" or case.config.model.tie_word_embeddings
        passes, losses_of = (1 / case.micro_batches, losses) if is_head else (0.0, 0)
        look_ups = losses if weight.group == "embedding" else 0
    size = FLOAT32 if weight.group == "router" else case.compute_bytes
    sent = part * (parts - 1)
    yield Transfer("weight gathers", gathered, "all-gather", passes * sent * size)
    yield Transfer("gradient scatters", gathered, "reduce-scatter", losses_of * sent * FLOAT32)
    summed = (losses_of + look_ups) * 2 * part * FLOAT32 * (copies - 1) / copies
    yield Transfer("gradient all-reduce", others, "all-reduce", summed)


def _of_embedding(case: Case) -> Iterator[Transfer]:
    """Token ids to all parts of the table; vectors back, and their gradients."""
    (table,) = (w for w in case.weights if w.group == "embedding")
    axes = table.split_over(case.sizes)
    devices, depth = sharding.num_shards(dict(case.sizes), axes), case.depth
    # Modules that predict ahead look up once more if they keep nothing of what has travelled.
    forward = 1 + depth * (1 if keeps_exchanges(case) else 2)
    ids = forward * case.tokens * INT32 * (devices - 1)
    yield Transfer("embedding", axes, "all-gather", ids)
    vector = case.config.model.hidden_size * case.compute_bytes * (devices - 1) / devices
    vectors = (forward + 1 + depth) * case.tokens * vector
    yield Transfer("embedding", axes, "all-to-all", vectors)


def _of_exchange(case: Case) -> Iterator[Transfer]:
    """Rows to their experts' devices and back, forward and backward, in all routed layers.

    A row goes with the ids and gate weights of its choices. In a layer that is computed again it
    goes again; a module that predicts ahead ends in a norm, which wants the result again as well.
    What goes there may have eight bits, and what comes back never has.
    """
    moe = case.config.model.moe
    layers = case.routed_layers + case.depth
    again, ahead_again = (0, 0) if keeps_exchanges(case) else (layers, case.depth)
    choices = 2 * moe.num_experts_per_tok * FLOAT32
    row, result = case.row_bytes(case.compute_bytes), case.row_bytes(case.combine_bytes)
    there = (layers + again) * (row + choices) + layers * result
    dim = case.config.model.hidden_size
    row, result = dim * case.compute_bytes, dim * case.combine_bytes
    back = (layers + ahead_again) * result + layers * (row + choices)
    for axis, rows in rows_by_axis(case).items():
        yield Transfer("dispatch", (axis,), "all-to-all", rows * there)
        yield Transfer("combine", (axis,), "all-to-all", rows * back)


def keeps_exchanges(case: Case) -> bool:
    """Whether what has come to a device stays there for the backward pass."""
    return case.config.training.rematerialization in ("none", "minimal")


def rows_by_axis(case: Case) -> dict[str, float]:
    """Rows of a micro-batch that leave a device on their way to their experts, in one layer.

    The padded exchange sends whole buffers, which hold `buffer_factor` times a balanced load.
    """
    moe, sizes = case.config.model.moe, [case.sizes[axis] for axis in EXPERT_AXES]
    rows = _rows(moe, case.tokens // case.parts, sizes, padded=_is_padded(case))
    return {axis: n * case.parts for axis, n in zip(EXPERT_AXES, rows, strict=True)}


def _is_padded(case: Case) -> bool:
    wanted = case.config.model.backends.exchange
    form = BACKENDS["exchange"][case.platform][0] if wanted == "auto" else wanted
    return form == "padded"


def share_of_tokens(moe: MoEConfig, experts: int) -> float:
    """The share of tokens with a choice among so many neighbouring experts, routing balanced.

    Each token chooses `num_limited_groups` of the groups and `num_experts_per_tok` of the experts
    in these, all alike (DeepSeek-V3, section 2.1.2).

    Args:
      experts: of a device or of a group of devices: whole groups, or parts of one.
    """
    return _balanced(moe, 1).share(experts)


def exchanged_rows(moe: MoEConfig, tokens: int, axis_sizes: Sequence[int]) -> float:
    """Rows that leave a device on their way to their experts, one for each device they go to.

    Args:
      tokens: of this device.
      axis_sizes: of the mesh axes that experts are split over, the slowest first. A token goes once
        to each group of devices along the first, and there once to each device along the second.
    """
    return sum(_rows(moe, tokens, axis_sizes, padded=False))


def _rows(moe: MoEConfig, tokens: int, axis_sizes: Sequence[int], padded: bool) -> list[float]:
    rows, experts = [], moe.num_experts
    for devices in axis_sizes:
        experts //= devices
        balanced = _balanced(moe, tokens)
        to_each = balanced.rows(experts) if padded else tokens * balanced.share(experts)
        rows.append((devices - 1) * to_each)
        tokens *= devices
    return rows


def buffer_rows(case: Case) -> list[float]:
    """Slots of the rows that come to a device, along each of the axes that experts are split over.

    This device's own are among them.
    """
    sizes = [case.sizes[axis] for axis in EXPERT_AXES]
    rows = _rows(case.config.model.moe, case.tokens // case.parts, sizes, padded=True)
    return [
        n * case.parts * size / (size - 1) for n, size in zip(rows, sizes, strict=True) if size > 1
    ]


def returned_rows(case: Case) -> list[float]:
    """Slots of the rows that come back to a device, along each of these axes."""
    rows = buffer_rows(case)
    if _is_padded(case):
        return rows
    # As many as each row that is sent on could have, whatever the routing.
    sizes = [case.sizes[axis] for axis in EXPERT_AXES if case.sizes[axis] > 1]
    top_k = case.config.model.moe.num_experts_per_tok
    return [n * min(top_k, size) for n, size in zip([case.tokens, *rows], sizes, strict=False)]


def _balanced(moe: MoEConfig, tokens: int) -> Balanced:
    groups = moe.num_expert_groups, moe.num_limited_groups
    return Balanced(tokens, moe.num_experts_per_tok, moe.num_experts, moe.buffer_factor, *groups)


class Links(NamedTuple):
    """Bytes that leave a device over links inside a domain (ICI, NVLink) and between domains."""

    fast: float
    slow: float


def links(transfer: Transfer, sizes: Mapping[str, int], topology: Topology) -> Links:
    """Which links carry it.

    Neighbours along the last mesh axes are neighbours in the machine (`sharding.DEVICE_ORDER`). An
    all-to-all sends each other device its own rows. Gathers and sums go once to each domain and are
    shared out there, each of its devices taking a part.
    """
    devices = math.prod(sizes[axis] for axis in transfer.axes)
    near = _in_a_domain(transfer.axes, sizes, topology.domain)
    if transfer.collective == "all-to-all":
        far = transfer.bytes * (devices - near) / (devices - 1)
    else:
        far = transfer.bytes / near if near < devices else 0.0
    return Links(transfer.bytes - far, far)


def _in_a_domain(axes: Sequence[str], sizes: Mapping[str, int], domain: int) -> int:
    """Devices of a group along these axes that fast links join."""
    near, stride = 1, 1
    for axis in reversed(DEVICE_ORDER):
        if axis in axes:
            near *= min(sizes[axis], max(1, domain // stride))
        stride *= sizes[axis]
    return near


def hops(transfer: Transfer, sizes: Mapping[str, int], topology: Topology) -> float:
    """Links that a byte of an all-to-all takes on a TPU's torus, on average.

    Of a square or a cube: a quarter of its side along each dim. All else goes from neighbour to
    neighbour, and GPUs' links lead to a switch.
    """
    dims = topology.name.partition(":")[2].count("x") + 1
    if topology.machine.fast_domain is not None or transfer.collective != "all-to-all":
        return 1.0
    devices = math.prod(sizes[axis] for axis in transfer.axes)
    return max(1.0, dims * devices ** (1 / dims) / 4)


def seconds(transfer: Transfer, sizes: Mapping[str, int], topology: Topology) -> float:
    """At the stated rates. Both kinds of links carry their part at the same time."""
    fast, slow = links(transfer, sizes, topology)
    machine = topology.machine
    of_fast = fast * hops(transfer, sizes, topology) / machine.fast_links
    return max(of_fast, slow / machine.slow_links if slow else 0.0)
