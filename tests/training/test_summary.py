"""Lines for a person."""

from moe_jax.training import summary


def test_skipped_updates_name_the_router_that_is_not_finite() -> None:
    metrics = {"skipped_updates": 3, "first_router_not_finite": 2}
    text = "3 updates skipped: not finite; scores of the router in routed layer 2 are not"
    assert summary.skipped(metrics) == text
    plain = "3 updates skipped: not finite"
    assert summary.skipped({**metrics, "first_router_not_finite": -1}) == plain
    assert summary.skipped({"skipped_updates": 3}) == plain  # without routed layers
