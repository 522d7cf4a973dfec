"""Shares of tokens by hand and by listing all choices."""

import itertools

import pytest

from moe_jax.config import MoEConfig
from moe_jax.planning.communication import exchanged_rows, share_of_tokens


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
