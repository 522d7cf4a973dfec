"""What exceeds a capacity, against a loop over choices; the same on every mesh."""

import math

import chex
import jax
import numpy as np
import pytest
from emulated import make_mesh

from moe_jax.config import MoEConfig
from moe_jax.ops.token_dropping import kept_choices
from moe_jax.sharding import BATCH, BATCH_AXES

# On eight devices three rows each, so that groups of two or eight end in the midst of a device.
ROWS, LENGTH, TOP_K, EXPERTS, DEVICES = 24, 4, 2, 8, 4
NOWHERE = EXPERTS


def _choices() -> tuple[np.ndarray, np.ndarray]:
    """Skewed ids, some of them nowhere, and scores that differ."""
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.geometric(0.4, (ROWS, LENGTH, TOP_K)) - 1, EXPERTS).astype(np.int32)
    scores = rng.permutation(ROWS * LENGTH * TOP_K).reshape(ids.shape).astype(np.float32) / 100
    return ids, scores


def _by_loops(ids: np.ndarray, scores: np.ndarray, config: MoEConfig) -> np.ndarray:
    group = config.capacity_group or ROWS
    per_device = config.token_dropping == "device"
    buckets = config.num_device_groups if per_device else EXPERTS
    capacity = math.ceil(config.capacity_factor * group * LENGTH * TOP_K / buckets)
    kept = np.ones(ids.shape, bool)
    for start in range(0, ROWS, group):
        rows = range(start, start + group)
        for bucket in range(buckets):
            mine = [
                (r, t, k)
                for k in range(TOP_K)
                for r in rows
                for t in range(LENGTH)
                if ids[r, t, k] < EXPERTS and ids[r, t, k] * buckets // EXPERTS == bucket
            ]
            if per_device:
                share = config.undropped_sequences
                exempt = {r for r in rows if math.floor(r * share) != math.floor((r - 1) * share)}
                mine.sort(key=lambda c: (c[0] not in exempt, -scores[c]))
            for choice in mine[capacity:]:
                kept[choice] = per_device and choice[0] in exempt
    return kept


def _run(
    sizes: dict[str, int],
    config: MoEConfig,
    choices: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(choices or _choices(), jax.NamedSharding(mesh, BATCH))
        run = jax.shard_map(
            lambda ids, scores: kept_choices(ids, scores, config, BATCH_AXES),
            in_specs=(BATCH, BATCH),
            out_specs=BATCH,
        )
        return np.asarray(jax.jit(run)(*placed))


@pytest.mark.parametrize("group", [1, 2, 8, None])
@pytest.mark.parametrize("policy", ["expert", "device"])
def test_equals_a_loop_on_every_mesh(policy: str, group: int | None) -> None:
    config = MoEConfig(
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        token_dropping=policy,
        capacity_factor=0.9,
        capacity_group=group,
        num_device_groups=DEVICES,
        undropped_sequences=0.3,
    )
    ids, scores = _choices()
    expected = _by_loops(ids, scores, config)
    real = ids < NOWHERE
    assert 5 < np.sum(~expected) < np.sum(real) - 5
    for sizes in ({}, {"data": 2}, {"fsdp": 2, "expert": 2}, {"expert_outer": 2, "expert": 4}):
        # What goes nowhere is neither kept nor dropped.
        chex.assert_trees_all_equal(_run(sizes, config)[real], expected[real])


def test_rows_that_are_never_dropped_from_come_first() -> None:
    fields = dict(num_experts=EXPERTS, token_dropping="device", num_device_groups=2)
    config = MoEConfig(
        **fields, num_experts_per_tok=TOP_K, capacity_factor=0.1, capacity_group=None
    )
    kept = _run({}, config)
    ids = _choices()[0]
    exempt = np.isin(np.arange(ROWS), [0, 10, 20])  # one row in ten, the first among them
    assert kept[exempt].all()
    assert not kept[~exempt][ids[~exempt] < 4].any()  # theirs exceed the first group's capacity


@pytest.mark.parametrize(("share", "rows"), [(0.0, 0), (0.25, 6), (0.5, 12), (1.0, 24)])
def test_the_share_of_rows_that_are_never_dropped_from(share: float, rows: int) -> None:
    """Every choice is one device group's, and its capacity is but one of them."""
    config = MoEConfig(
        num_experts=EXPERTS,
        token_dropping="device",
        capacity_factor=1e-9,
        capacity_group=None,
        num_device_groups=1,
        undropped_sequences=share,
    )
    ids, scores = _choices()
    kept = _run({"expert": 2}, config, (np.zeros_like(ids), scores))
    assert kept.all(axis=(1, 2)).sum() == rows
    assert kept.sum() == max(rows * LENGTH * TOP_K, 1)


@pytest.mark.parametrize("policy", ["expert", "device"])
def test_equal_scores_are_dropped_from_alike_on_every_mesh(policy: str) -> None:
    config = MoEConfig(
        num_experts=EXPERTS,
        token_dropping=policy,
        capacity_factor=1.0,
        capacity_group=4,
        num_device_groups=2,
        undropped_sequences=0.0,
    )
    ids = np.zeros((ROWS, LENGTH, TOP_K), np.int32)
    choices = ids, np.full(ids.shape, 0.5, np.float32)
    kept = _run({}, config, choices)
    # The capacity is one balanced load of the 32 choices of a group.
    of_group = kept.reshape(6, -1).sum(axis=1)
    chex.assert_trees_all_equal(of_group, np.full(6, 32 // (8 if policy == "expert" else 2)))
    for sizes in ({"fsdp": 2, "expert": 2}, {"expert_outer": 4, "expert": 2}):
        chex.assert_trees_all_equal(_run(sizes, config, choices), kept)


def test_large_capacities_keep_everything() -> None:
    for policy in ("expert", "device"):
        config = MoEConfig(
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            token_dropping=policy,
            capacity_factor=float(EXPERTS),
            num_device_groups=DEVICES,
        )
        assert _run({"fsdp": 2}, config).all()
