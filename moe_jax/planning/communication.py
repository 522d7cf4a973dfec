"""Bytes that a model must exchange, counted from its config."""

import math
from collections.abc import Sequence

from moe_jax.config import MoEConfig


def share_of_tokens(moe: MoEConfig, experts: int) -> float:
    """The share of tokens with a choice among so many neighbouring experts, routing balanced.

    Each token chooses `num_limited_groups` of the groups and `num_experts_per_tok` of the experts
    in these, all alike (DeepSeek-V3, section 2.1.2).

    Args:
      experts: of a device or of a group of devices: whole groups, or parts of one.
    """
    groups, chosen = moe.num_expert_groups, moe.num_limited_groups
    size = moe.num_experts // groups
    here, of_group = max(1, experts // size), min(experts, size)
    assert experts == here * of_group, (experts, size)
    missed = sum(
        # Of the chosen groups, so many are here.
        math.comb(here, met)
        * math.comb(groups - here, chosen - met)
        * math.comb(chosen * size - met * of_group, moe.num_experts_per_tok)
        for met in range(max(0, chosen - groups + here), min(here, chosen) + 1)
    )
    return 1 - missed / math.comb(groups, chosen) / math.comb(
        chosen * size, moe.num_experts_per_tok
    )


def exchanged_rows(moe: MoEConfig, tokens: int, axis_sizes: Sequence[int]) -> float:
    """Rows that leave a device on their way to their experts, one for each device they go to.

    Args:
      tokens: of this device.
      axis_sizes: of the mesh axes that experts are split over, the slowest first. A token goes once
        to each group of devices along the first, and there once to each device along the second.
    """
    rows, experts = 0.0, moe.num_experts
    for devices in axis_sizes:
        experts //= devices
        rows += (devices - 1) * tokens * share_of_tokens(moe, experts)
        tokens *= devices
    return rows
