"""Balance losses and the router's bias, against the papers' equations in loops."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.ops import balance

EXPERTS, TOP_K, DEVICES, LIMIT = 8, 3, 4, 2
VALID = np.ones((4, 9), bool)
VALID[1, 6:] = VALID[2, :] = False
VALID[3, ::2] = False


def _scores(seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(4, 9, EXPERTS))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def _ids(seed: int) -> np.ndarray:
    """Choices that are not those of the scores: a bias or groups have steered them."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [[rng.permutation(EXPERTS)[:TOP_K] for _ in range(9)] for _ in range(4)]
    ).astype(np.int32)


def _config(**weights: float) -> MoEConfig:
    return MoEConfig(
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_expert_groups=DEVICES,
        num_limited_groups=LIMIT,
        num_device_groups=DEVICES,
        **{"sequence_loss_weight": 0.0, **weights},
    )


def _f_and_p(scores: np.ndarray, ids: list[list[int]], tokens: list[int]) -> Any:
    """f and P of each expert over a sequence's tokens, in float64."""
    f, p = np.zeros(EXPERTS), np.zeros(EXPERTS)
    for t in tokens:
        for i in ids[t]:
            f[i] += EXPERTS / (TOP_K * len(tokens))
        p += scores[t].astype(np.float64) / scores[t].astype(np.float64).sum() / len(tokens)
    return f, p


def _by_loops(name: str, scores: np.ndarray, ids: np.ndarray, valid: np.ndarray) -> float:
    """One sequence: V3, equations 17 to 20; V2, section 2.2.3."""
    tokens = [t for t in range(len(scores)) if valid[t]]
    if not tokens:
        return 0.0
    chosen = ids.tolist()
    if name == "sequence_loss":
        chosen = [sorted(range(EXPERTS), key=lambda j: -s[j])[:TOP_K] for s in scores]
    f, p = _f_and_p(scores, chosen, tokens)
    if name in ("sequence_loss", "expert_loss"):
        return float(f @ p)
    size, total = EXPERTS // DEVICES, 0.0
    for d in range(DEVICES):
        mine = range(d * size, (d + 1) * size)
        if name == "device_loss":
            share = sum(f[i] for i in mine) / size
        else:
            sent = sum(any(i in mine for i in chosen[t]) for t in tokens)
            share = DEVICES / (LIMIT * len(tokens)) * sent
        total += share * sum(p[i] for i in mine)
    return total


NAMES = ["sequence_loss", "expert_loss", "device_loss", "communication_loss"]


@pytest.mark.parametrize("name", NAMES)
def test_sequence_losses_equal_the_equations(name: str) -> None:
    scores, ids, config = _scores(5), _ids(6), _config(**{f"{name}_weight": 0.1})

    def loss(scores: Any) -> jax.Array:
        losses = balance.sequence_losses(scores, jnp.asarray(ids), jnp.asarray(VALID), config)
        assert set(losses) == {name}
        return losses[name]

    expected = sum(_by_loops(name, scores[s], ids[s], VALID[s]) for s in range(4))
    chex.assert_trees_all_close(loss(scores), expected, rtol=1e-5)
    gradient = jax.grad(loss)(scores)
    chex.assert_tree_all_finite(gradient)
    chex.assert_trees_all_equal(gradient[~VALID], np.zeros(gradient[~VALID].shape))
    assert jnp.all(jnp.any(gradient[VALID] != 0, axis=-1))
    # Choices are constant: a small step changes shares alone.
    step = np.random.default_rng(0).normal(size=scores.shape)
    ends = [
        sum(_by_loops(name, (scores + h * step)[s], ids[s], VALID[s]) for s in range(4))
        for h in (1e-5, -1e-5)
    ]
    chex.assert_trees_all_close(
        np.sum(gradient * step), (ends[0] - ends[1]) / 2e-5, rtol=2e-3, atol=1e-4
    )


def test_sequence_losses_are_one_at_perfect_balance_and_larger_beyond() -> None:
    """Every token sends each of its experts to a device of its own, in turn."""
    even = np.array([[0, 2], [4, 6], [1, 3], [5, 7]], np.int32)
    config = MoEConfig(
        num_experts=8,
        num_experts_per_tok=2,
        num_expert_groups=4,
        num_limited_groups=2,
        num_device_groups=4,
        sequence_loss_weight=1.0,
        expert_loss_weight=1.0,
        device_loss_weight=1.0,
        communication_loss_weight=1.0,
    )

    def losses(ids: np.ndarray) -> dict[str, jax.Array]:
        scores = np.full((1, 4, 8), 0.1, np.float32)
        np.put_along_axis(scores[0], ids, 0.8, axis=-1)
        return balance.sequence_losses(scores, ids[None], jnp.ones((1, 4), bool), config)

    assert set(losses(even)) == set(NAMES)
    chex.assert_trees_all_close(losses(even), dict.fromkeys(NAMES, 1.0), rtol=1e-6)
    for name, value in losses(np.tile(np.array([[0, 2]], np.int32), (4, 1))).items():
        assert value > 1.2, name


def _routing(layers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [layers, tokens, experts], their softmax, and the load of its top-k."""
    logits = np.random.default_rng(3).normal(size=(layers, 20, EXPERTS))
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    load = np.zeros((layers, EXPERTS), np.int32)
    for layer in range(layers):
        for t in range(20):
            for i in np.argsort(-shares[layer, t])[:TOP_K]:
                load[layer, i] += 1
    return logits, shares, load


def test_batch_losses_equal_the_equations() -> None:
    logits, shares, load = _routing(layers=3)
    config = _config(switch_loss_weight=1.0, mixtral_loss_weight=1.0, z_loss_weight=1.0)
    z = np.log(np.exp(logits).sum(axis=-1)) ** 2
    losses = balance.batch_losses(
        jnp.asarray(load), jnp.asarray(shares.sum(axis=1)), z.sum(axis=1), jnp.asarray(20), config
    )
    switch = sum(
        EXPERTS * sum(load[n, i] / (20 * TOP_K) * shares[n, :, i].mean() for i in range(EXPERTS))
        for n in range(3)
    )
    mixtral = EXPERTS * sum(load[:, i].sum() / 60 * shares[:, :, i].mean() for i in range(EXPERTS))
    expected = {"switch_loss": switch, "mixtral_loss": mixtral, "z_loss": z.mean(axis=1).sum()}
    chex.assert_trees_all_close(losses, expected, rtol=1e-5)


def test_batch_losses_at_balance_and_gradients_through_shares_alone() -> None:
    """1 a layer for Switch's, experts per token for Mixtral's, whatever a layer's tokens."""
    config = _config(switch_loss_weight=1.0, mixtral_loss_weight=1.0, z_loss_weight=1.0)
    tokens = np.array([16, 8], np.int32)  # layers of unequal tokens: multi-token prediction
    load = np.repeat(tokens[:, None] * TOP_K // EXPERTS, EXPERTS, axis=1)
    share = np.repeat(tokens[:, None] / EXPERTS, EXPERTS, axis=1).astype(np.float32)
    z = tokens * np.array([2.0, 3.0], np.float32)

    def losses(share: Any, z: Any) -> dict[str, jax.Array]:
        return balance.batch_losses(jnp.asarray(load), share, z, jnp.asarray(tokens), config)

    expected = {"switch_loss": 2.0, "mixtral_loss": float(TOP_K), "z_loss": 5.0}
    chex.assert_trees_all_close(losses(share, z), expected, rtol=1e-6)
    gradients = jax.jit(jax.jacobian(losses, argnums=(0, 1)))(share, z)
    per_token = 1 / tokens[:, None] + np.zeros((2, EXPERTS))
    expected = {
        "switch_loss": (per_token, np.zeros(2)),
        "mixtral_loss": (TOP_K / 2 * per_token, np.zeros(2)),
        "z_loss": (np.zeros((2, EXPERTS)), 1 / tokens),
    }
    chex.assert_trees_all_close(gradients, expected, rtol=1e-6)


def test_a_loss_without_a_weight_is_not_made() -> None:
    _, shares, load = _routing(layers=1)
    arguments = (load, shares.sum(axis=1), np.ones(1), jnp.asarray(20))
    assert balance.batch_losses(*arguments, _config()) == {}
    assert balance.sequence_losses(_scores(1), _ids(1), VALID, _config()) == {}


def test_batch_losses_of_padding_alone_are_finite() -> None:
    config = _config(switch_loss_weight=1.0, mixtral_loss_weight=1.0, z_loss_weight=1.0)
    nothing = np.zeros((2, EXPERTS))
    losses = balance.batch_losses(nothing, nothing, np.zeros(2), jnp.asarray(0), config)
    chex.assert_trees_all_equal(losses, dict.fromkeys(losses, 0.0))


def test_max_violation() -> None:
    load = jnp.array([[4, 4, 4, 4], [0, 16, 0, 0], [1, 2, 3, 6], [0, 0, 0, 0]], jnp.int32)
    chex.assert_trees_all_close(balance.max_violation(load), np.array([0.0, 3.0, 1.0, 0.0]))


def test_update_bias_moves_towards_balance_by_its_speed() -> None:
    bias = jnp.array([[0.5, -0.5, 0.0], [1.0, 1.0, 1.0]])
    load = jnp.array([[0, 3, 9], [4, 4, 4]], jnp.int32)
    expected = np.array([[0.51, -0.49, -0.01], [1.0, 1.0, 1.0]])
    # The mean is 4: one expert is over-loaded, and equal loads move nothing.
    chex.assert_trees_all_close(balance.update_bias(bias, load, 0.01), expected, rtol=1e-6)
