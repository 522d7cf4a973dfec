"""Shares of tokens by hand and by listing all choices."""

import itertools

import pytest
from compiled_steps import HELD, case_of, counts_of

from moe_jax.config import Config, MoEConfig
from moe_jax.planning.communication import (
    Links,
    Transfer,
    exchanged_rows,
    links,
    seconds,
    share_of_tokens,
    transfers,
)
from moe_jax.planning.machines import Machine, Topology


def _moe(experts: int, top_k: int, groups: int = 1, chosen: int = 1) -> MoEConfig:
    return MoEConfig(
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_expert_groups=groups,
        num_limited_groups=chosen,
    )


@pytest.mark.parametrize(
    ("moe", "experts"),
    [
        (_moe(8, 2), 2),
        (_moe(8, 3), 8),
        (_moe(12, 3, groups=4, chosen=2), 1),
        (_moe(12, 3, groups=4, chosen=2), 3),
        (_moe(12, 3, groups=4, chosen=2), 6),
        (_moe(12, 3, groups=4, chosen=3), 12),
    ],
)
def test_shares_of_all_choices(moe: MoEConfig, experts: int) -> None:
    size = moe.num_experts // moe.num_expert_groups
    hits = [
        min(choice) < experts
        for groups in itertools.combinations(range(moe.num_expert_groups), moe.num_limited_groups)
        for choice in itertools.combinations(
            [group * size + i for group in groups for i in range(size)], moe.num_experts_per_tok
        )
    ]
    assert share_of_tokens(moe, experts) == pytest.approx(sum(hits) / len(hits))


def test_rows_that_leave_a_device() -> None:
    # One choice: three of four go elsewhere.
    assert exchanged_rows(_moe(8, 1), 100, [1, 4]) == pytest.approx(75)
    # All chosen: one row to each other device, and in two steps one to each other group and, of
    # what has come together, one to each other device of the group.
    assert exchanged_rows(_moe(8, 8), 100, [4]) == pytest.approx(300)
    assert exchanged_rows(_moe(8, 8), 100, [2, 4]) == pytest.approx(100 + 3 * 200)
    assert exchanged_rows(_moe(8, 8), 100, [1, 1]) == 0


@pytest.mark.parametrize("config", HELD.values(), ids=HELD)
def test_the_compiled_step_sends_what_is_counted(config: Config) -> None:
    case, compiled = case_of(config), counts_of(config)
    planned: dict[str, float] = {}
    for transfer in transfers(case):
        planned[transfer.collective] = planned.get(transfer.collective, 0.0) + transfer.bytes
    for kind in ("all-gather", "all-to-all"):
        assert compiled.collective_bytes(kind) == pytest.approx(planned.get(kind, 0.0), rel=1e-9)
    # On CPU, XLA writes most reduce-scatters as all-reduces, which send twice as much.
    fsdp = case.sizes["fsdp"]
    reduced = {
        of_fsdp: sum(
            c.bytes * c.times
            for c in compiled.collectives
            if c.kind == "all-reduce" and (c.group == fsdp) == of_fsdp
        )
        for of_fsdp in (True, False)
    }
    scattered = compiled.collective_bytes("reduce-scatter") + reduced[True] / 2
    assert scattered == pytest.approx(planned.get("reduce-scatter", 0.0), rel=1e-3)
    # Statistics of the routing, and the router's gradient, which is summed before it is cut.
    others = 0.02 * (planned["reduce-scatter"] + planned["all-reduce"])
    assert reduced[False] == pytest.approx(planned["all-reduce"], abs=others)


GPUS = Machine("test", {"bfloat16": 1.0}, 1, 1, fast_links=100.0, fast_domain=8, slow_links=10.0)
SIZES = {"pipeline": 1, "data": 2, "fsdp": 4, "expert_outer": 2, "expert": 4}
SIZES |= {"context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("axes", "collective", "fast", "slow"),
    [
        # The experts' two axes fill a host of eight.
        (("expert",), "all-to-all", 6.0, 0.0),
        (("expert_outer", "expert"), "all-gather", 6.0, 0.0),
        # The parts of fsdp are on four hosts.
        (("fsdp",), "reduce-scatter", 0.0, 6.0),
        # Of 31 others, 24 are elsewhere; a sum goes once to each host, an eighth by each device.
        (("fsdp", "expert_outer", "expert"), "all-to-all", 6 * 7 / 31, 6 * 24 / 31),
        (("fsdp", "expert_outer", "expert"), "all-reduce", 6 * 7 / 8, 6 / 8),
    ],
)
def test_links_that_carry_it(
    axes: tuple[str, ...], collective: str, fast: float, slow: float
) -> None:
    topology = Topology(GPUS, 64, 8, "test:8x8")
    transfer = Transfer("any", axes, collective, 6.0)
    assert links(transfer, SIZES, topology) == pytest.approx(Links(fast, slow))
    assert seconds(transfer, SIZES, topology) == pytest.approx(max(fast / 100, slow / 10))


def test_rows_on_a_torus_take_several_links() -> None:
    """Of 64 in a cube of four: a ring's mean distance is 1, in each of three dims."""
    tpu = GPUS._replace(fast_domain=None, slow_links=0.0)
    topology = Topology(tpu, 64, 64, "test:4x4x4")
    sizes = dict.fromkeys(SIZES, 1) | {"expert": 64}
    rows, sums = (Transfer("any", ("expert",), kind, 6.0) for kind in ("all-to-all", "all-reduce"))
    assert seconds(rows, sizes, topology) == pytest.approx(3 * 6 / 100)
    assert seconds(sums, sizes, topology) == pytest.approx(6 / 100)
