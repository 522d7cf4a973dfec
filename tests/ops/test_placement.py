"""Where replicas of experts stand, for any loads, and how tokens' choices are shared among them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import UserError
from moe_jax.ops.placement import device_loads, physical_ids, place

Case = tuple[np.ndarray, int, int]
LOADS = st.one_of(st.integers(0, 3), st.integers(0, 10**6), st.floats(1e-3, 1e6))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Loads, devices, slots of each: from no spare slot to all experts on every device."""
    devices, of_device = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    experts, layers = devices * of_device, draw(st.integers(1, 2))
    rows = st.lists(LOADS, min_size=experts, max_size=experts)
    load_LE = np.array(draw(st.lists(rows, min_size=layers, max_size=layers)), float)
    return load_LE, devices, draw(st.integers(of_device, experts))


def _in_order(load_LE: np.ndarray) -> np.ndarray:
    return np.tile(np.arange(load_LE.shape[1]), (len(load_LE), 1))


def _fullest(table_LS: np.ndarray, load_LE: np.ndarray, devices: int) -> np.ndarray:
    """[layers], over the mean; 1 where there is no load."""
    load_LD = device_loads(table_LS, load_LE, devices)
    fullest_L, mean_L = load_LD.max(axis=1), load_LD.mean(axis=1)
    return np.divide(fullest_L, mean_L, where=mean_L > 0, out=np.ones_like(mean_L))


@settings(deadline=None, max_examples=200)
@given(cases())
def test_every_expert_has_its_slots_and_no_device_much_load(case: Case) -> None:
    load_LE, devices, per_device = case
    layers, experts = load_LE.shape
    spare = devices * per_device - experts
    table_LS, slots_LER = placement = place(load_LE, devices, per_device)
    chex.assert_trees_all_equal(placement, place(load_LE.copy(), devices, per_device))
    assert table_LS.shape == (layers, devices * per_device)
    for row, slots_ER in zip(table_LS, slots_LER, strict=True):
        for expert, slots in enumerate(slots_ER.tolist()):
            mine = np.flatnonzero(row == expert).tolist()
            assert mine and slots == mine + [-1] * (len(slots) - len(mine))

    fullest_L = _fullest(table_LS, load_LE, devices)
    assert (fullest_L >= 1 - 1e-9).all()
    assert (fullest_L <= 1 + devices / (spare + 1) + 1e-9).all()
    assert (fullest_L <= _fullest(_in_order(load_LE), load_LE, devices) + 1e-9).all()


@settings(deadline=None, max_examples=200)
@given(cases())
def test_replicas_are_apart_and_as_light_as_can_be(case: Case) -> None:
    load_LE, devices, per_device = case
    load_E = load_LE[0]
    (row,) = place(load_E[None], devices, per_device).expert_of_slot_LS
    by_device = row.reshape(devices, per_device)
    if any(len(set(experts)) < per_device for experts in by_device.tolist()):
        # Experts in the order of their ids, which no other table was better than.
        experts = _in_order(load_LE)[0].reshape(devices, -1)
        chex.assert_trees_all_equal(by_device[:, : experts.shape[1]], experts)
        return
    count_E = np.bincount(row)
    share_E = load_E / count_E
    heaviest = share_E[count_E < devices].max(initial=0.0)
    if heaviest:  # that all were lighter would take more slots than there are
        needed_E = np.ceil(load_E / heaviest * (1 + 1e-9))
        assert np.clip(needed_E, 1, devices).sum() > len(row)
    load_D = share_E[by_device].sum(axis=1)
    assert np.ptp(load_D) <= heaviest + 1e-9 * load_D.max()


@pytest.mark.parametrize(
    ("experts", "devices", "spare", "before", "after"),
    [(256, 32, 32, 5.0, 1.01), (256, 64, 64, 10.0, 1.04), (64, 8, 8, 2.0, 1.01)],
)
def test_zipf_loads_become_even(
    experts: int, devices: int, spare: int, before: float, after: float
) -> None:
    zipf_LE = np.tile(1e4 / np.arange(1, experts + 1), (8, 1))
    load_LE = np.random.default_rng(0).permuted(zipf_LE, axis=1)
    placement = place(load_LE, devices, (experts + spare) // devices)
    assert _fullest(_in_order(load_LE), load_LE, devices).mean() > before
    assert _fullest(placement.expert_of_slot_LS, load_LE, devices).max() < after


def test_a_table_made_by_hand() -> None:
    """Of three spare slots the hot expert gets two; its third replica then stands everywhere."""
    placement = place(np.array([[12, 1, 1, 6, 2, 2]]), 3, 3)
    table = [[0, 3, 1], [0, 3, 2], [0, 4, 5]]
    chex.assert_trees_all_equal(placement.expert_of_slot_LS, np.array([sum(table, [])], np.int32))
    chex.assert_trees_all_equal(
        placement.slots_of_expert_LER[0, :4],
        np.array([[0, 3, 6], [2, -1, -1], [5, -1, -1], [1, 4, -1]], np.int32),
    )


@pytest.mark.parametrize("load", [0, 5])
def test_of_equal_loads_each_gets_a_replica_before_one_gets_two(load: int) -> None:
    (row,) = place(np.full((1, 8), load), 4, 4).expert_of_slot_LS
    chex.assert_trees_all_equal(np.bincount(row), np.full(8, 2))


@pytest.mark.parametrize(
    ("load", "devices", "per_device", "sentence"),
    [
        ([1, -2, 0, 0], 2, 2, "the load -2.0 of an expert must be finite and at least 0"),
        ([1, np.nan, 0, 0], 2, 2, "the load nan of an expert must be finite and at least 0"),
        ([np.inf, 1, 0, 0], 2, 2, "the load inf of an expert must be finite and at least 0"),
        ([1, 1, 1, 1], 3, 2, "4 experts do not divide over 3 devices"),
        (
            [1, 1, 1, 1],
            2,
            1,
            "2 devices of 1 slots have 2, which must be at least the 4 experts and at most 8, all "
            "of them on each",
        ),
        (
            [1, 1, 1, 1],
            2,
            5,
            "2 devices of 5 slots have 10, which must be at least the 4 experts and at most 8, all "
            "of them on each",
        ),
    ],
)
def test_what_cannot_be_placed(
    load: list[float], devices: int, per_device: int, sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        place(np.array([load]), devices, per_device)
    assert str(error.value) == sentence


def test_choices_take_replicas_in_turn() -> None:
    """As a loop over choices does; what goes nowhere still goes nowhere."""
    rng = np.random.default_rng(0)
    (slots_ER,) = place(np.array([[90, 5, 30, 1, 0, 2, 60, 9]]), 4, 4).slots_of_expert_LER
    ids_TK = np.minimum(rng.geometric(0.3, (150, 3)) - 2, 8).astype(np.int32)
    assert {-1, 8} < set(ids_TK.flat)
    run = jax.jit(physical_ids)
    total_S = np.zeros(16, int)
    for first in range(5):
        expected, seen = np.full(ids_TK.size, -1, np.int32), np.full(8, first)
        for choice, expert in enumerate(ids_TK.flat):
            if 0 <= expert < 8:
                replicas = slots_ER[expert][slots_ER[expert] >= 0]
                expected[choice] = replicas[seen[expert] % len(replicas)]
                seen[expert] += 1
        found = run(ids_TK, slots_ER, jnp.int32(first))
        chex.assert_trees_all_equal(np.asarray(found), expected.reshape(ids_TK.shape))
        total_S += np.bincount(expected[expected >= 0], minlength=16)
    for slots_R in slots_ER:
        assert np.ptp(total_S[slots_R[slots_R >= 0]]) <= 5


def test_one_token_on_each_of_many_devices() -> None:
    """They do not all take the first replica."""
    slots_ER = jnp.array([[0, 2, 5], [3, -1, -1]])
    found = [int(physical_ids(jnp.zeros((1, 1), int), slots_ER, i)[0, 0]) for i in range(4)]
    assert found == [0, 2, 5, 0]
