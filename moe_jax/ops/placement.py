"""Where experts stand when hot ones have replicas: more slots than experts, spread over devices.

A balancer fills the table from measured load, as DeepSeek-V3's inference does (section 3.4). A
layer's experts are replicated greedily: each spare slot goes to the expert with the highest load
per replica. Then they are dealt in rounds, the heaviest first: a round gives every device one
slot, and its heaviest goes to the device with the least load so far.

Two things follow, whatever the loads. Replicas of an expert stand on different devices. And the
fullest device exceeds the mean by the load of one replica at most, which is at most the total over
spare slots plus 1, so that the fullest has at most 1 + devices / (spare + 1) times the mean. Where
experts in the order of their ids are more even by luck, they stay, and spare slots are of no use.
Groups of experts are not kept together: limits on a token's groups do not limit its devices here.

Shapes: L layers, E experts, S slots (those of device 0 first), D devices, R most replicas of an
expert, T tokens, K choices per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import UserError
from moe_jax.ops import slots


class Placement(NamedTuple):
    """Who stands where.

    expert_of_slot_LS: [layers, slots] int32.
    slots_of_expert_LER: [layers, experts, most replicas] int32, in order; then -1.
    """

    expert_of_slot_LS: np.ndarray
    slots_of_expert_LER: np.ndarray


def place(load_LE: np.ndarray, num_devices: int, slots_per_device: int) -> Placement:
    """A table that makes the expected load of devices even.

    Args:
      load_LE: [layers, experts], tokens that chose each expert, or a share of them.
      num_devices: over which slots are split; it divides the experts.
      slots_per_device: of each layer.
    Raises:
      ValueError: a load is negative or not finite, or the slots are fewer than the experts or more
        than replicas on different devices can fill.
    """
    load_LE = np.asarray(load_LE, np.float64)
    experts, num_slots = load_LE.shape[1], num_devices * slots_per_device
    wrong = load_LE[~(np.isfinite(load_LE) & (load_LE >= 0))]
    if wrong.size:
        raise UserError(f"the load {wrong[0]} of an expert must be finite and at least 0")
    if experts % num_devices:
        raise UserError(f"{experts} experts do not divide over {num_devices} devices")
    if not experts <= num_slots <= experts * num_devices:
        raise UserError(
            f"{num_devices} devices of {slots_per_device} slots have {num_slots}, which must be at "
            f"least the {experts} experts and at most {experts * num_devices}, all of them on each"
        )
    table_LS = np.stack([_place_layer(load_E, num_devices, num_slots) for load_E in load_LE])
    return Placement(table_LS, _inverse(table_LS, experts))


def device_loads(table_LS: np.ndarray, load_LE: np.ndarray, num_devices: int) -> np.ndarray:
    """[layers, devices] float64, the expected load where replicas share their expert's."""
    load_LE = np.asarray(load_LE, np.float64)
    count_LE = np.stack([np.bincount(row, minlength=load_LE.shape[1]) for row in table_LS])
    load_LS = np.take_along_axis(load_LE / count_LE, table_LS, axis=1)
    return load_LS.reshape(len(table_LS), num_devices, -1).sum(axis=2)


def physical_ids(ids_TK: jax.Array, slots_of_expert_ER: jax.Array, first: jax.Array) -> jax.Array:
    """The slot of each choice, [T, K] int32: an expert's choices take its replicas in turn.

    On one device, what two replicas of an expert are given differs by one choice at most.

    Args:
      ids_TK: [tokens, top_k] int32, chosen experts; others go nowhere, to -1.
      slots_of_expert_ER: a layer's part of `Placement.slots_of_expert_LER`.
      first: [] int32, the replica that comes first: another on every device, or few tokens on each
        of many devices would all go to the same.
    """
    ids = ids_TK.reshape(-1)
    count_E = jnp.sum(slots_of_expert_ER >= 0, axis=1, dtype=jnp.int32)
    rank, _ = slots.ranks(ids, len(count_E))
    ids = jnp.where(ids < 0, len(count_E), ids)  # a negative index would count from the end
    replica = (rank + first) % count_E.at[ids].get(mode="fill", fill_value=1)
    slot = slots_of_expert_ER.at[ids, replica].get(mode="fill", fill_value=-1)
    return slot.reshape(ids_TK.shape)


def _place_layer(load_E: np.ndarray, devices: int, num_slots: int) -> np.ndarray:
    """[slots] int32, the expert in each."""
    in_order = np.arange(len(load_E)).reshape(devices, -1)
    # Spare slots of this table stand beside what they repeat, and change no device's load.
    repeated = np.stack([np.resize(row, num_slots // devices) for row in in_order])
    dealt = _deal(load_E, _count_replicas(load_E, num_slots, devices), devices)
    tables = np.stack([dealt.reshape(-1), repeated.reshape(-1)]).astype(np.int32)
    fullest = device_loads(tables, np.stack([load_E, load_E]), devices).max(axis=1)
    return tables[np.argmin(fullest)]


def _count_replicas(load_E: np.ndarray, num_slots: int, most: int) -> np.ndarray:
    """[experts] replicas of each, `most` at most; of equal loads, the one with fewer gets more."""
    count_E = np.ones(len(load_E), np.int64)
    for _ in range(num_slots - len(load_E)):
        share_E = np.where(count_E < most, load_E / count_E, -1.0)
        count_E[np.lexsort((count_E, -share_E))[0]] += 1
    return count_E


def _deal(load_E: np.ndarray, count_E: np.ndarray, devices: int) -> np.ndarray:
    """[devices, slots of each], the expert in each.

    Devices differ by a replica's load at most: in a round they get between its largest and its
    smallest, and the next round's largest is no more than that.
    """
    share_E = load_E / count_E
    # Experts that stand on every device come first: they fill whole rounds and leave all even.
    order = np.lexsort((-share_E, count_E < devices))
    rounds = np.repeat(order, count_E[order]).reshape(-1, devices)
    table_DS = np.full(rounds.shape[::-1], -1)
    total_D = np.zeros(devices)
    for number, experts in enumerate(rounds):
        for expert in experts:
            # One is always left without it: its replicas are no more than the devices, and those
            # that begin a round have all devices to choose from.
            barred_D = (table_DS[:, number] >= 0) | (table_DS == expert).any(axis=1)
            device = np.argmin(np.where(barred_D, np.inf, total_D))
            table_DS[device, number] = expert
            total_D[device] += share_E[expert]
    return table_DS


def _inverse(table_LS: np.ndarray, experts: int) -> np.ndarray:
    count_LE = np.stack([np.bincount(row, minlength=experts) for row in table_LS])
    slots_LER = np.full((*count_LE.shape, count_LE.max()), -1, np.int32)
    for layer, row in enumerate(table_LS):
        for expert in range(experts):
            slots_LER[layer, expert, : count_LE[layer, expert]] = np.flatnonzero(row == expert)
    return slots_LER
