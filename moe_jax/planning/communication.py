"""Bytes that a model must exchange, counted from its config."""

from collections.abc import Sequence

from moe_jax.config import MoEConfig
from moe_jax.ops.dispatch import Balanced


def share_of_tokens(moe: MoEConfig, experts: int) -> float:
    """The share of tokens with a choice among so many neighbouring experts, routing balanced.

    Each token chooses `num_limited_groups` of the groups and `num_experts_per_tok` of the experts
    in these, all alike (DeepSeek-V3, section 2.1.2).

    Args:
      experts: of a device or of a group of devices: whole groups, or parts of one.
    """
    groups = moe.num_expert_groups, moe.num_limited_groups
    return Balanced(1, moe.num_experts_per_tok, moe.num_experts, 1.0, *groups).share(experts)


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
