"""The gate, against loops over tokens."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.ops import routing

TOKENS = 64


def _config(**changes) -> MoEConfig:
    fields = dict(
        num_experts=12,
        num_experts_per_tok=3,
        num_expert_groups=4,
        num_limited_groups=2,
        routed_scaling_factor=2.5,
    )
    return MoEConfig(**(fields | changes))


def _scores(seed: int, tokens: int = TOKENS, experts: int = 12) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(tokens, experts))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def _chosen(scores: np.ndarray, bias: np.ndarray, config: MoEConfig) -> list[int]:
    """The experts of one token, best first: equation 14 among the best groups."""
    groups, size = config.num_expert_groups, config.num_experts // config.num_expert_groups
    biased = {i: float(np.float32(scores[i]) + np.float32(bias[i])) for i in range(len(scores))}
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    best = {"noaux_tc": 2, "group_limited_greedy": 1, "greedy": 1}[config.topk_method]
    group_score = [sum(sorted((biased[i] for i in m), reverse=True)[:best]) for m in members]
    limit = groups if config.topk_method == "greedy" else config.num_limited_groups
    kept = sorted(range(groups), key=lambda g: -group_score[g])[:limit]
    candidates = [i for g in kept for i in members[g]]
    return sorted(candidates, key=lambda i: -biased[i])[: config.num_experts_per_tok]


BIASES = {
    "zero": np.zeros(12),
    "mixed": np.random.default_rng(7).normal(scale=0.3, size=12),
    "negative": np.random.default_rng(8).uniform(-2.5, -1.2, size=12),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_expert_groups": 1, "num_limited_groups": 1},
        {"num_limited_groups": 4},
        {"num_limited_groups": 1},
        {"num_expert_groups": 12, "num_limited_groups": 5},  # groups of one expert
        {"norm_topk_prob": False},
        {"topk_method": "group_limited_greedy"},
        {"topk_method": "group_limited_greedy", "num_limited_groups": 1},
        {"topk_method": "greedy", "norm_topk_prob": False},
        {"num_experts_per_tok": 1, "routed_scaling_factor": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias_name", BIASES)
def test_route_equals_a_loop_over_tokens(changes: dict, bias_name: str) -> None:
    config, bias, scores = _config(**changes), BIASES[bias_name].astype(np.float32), _scores(0)
    result = routing.route(scores, bias, config)
    chex.assert_shape(result, (TOKENS, config.num_experts_per_tok))
    chex.assert_type([result.expert_ids_TK, result.weights_TK], [jnp.int32, jnp.float32])
    for t in range(TOKENS):
        expected = _chosen(scores[t], bias, config)
        assert result.expert_ids_TK[t].tolist() == expected
        weights = scores[t, expected].astype(np.float64)
        if config.norm_topk_prob:
            weights = weights / weights.sum()
        weights = weights * config.routed_scaling_factor
        chex.assert_trees_all_close(result.weights_TK[t], weights, rtol=1e-6)


def test_an_expert_of_a_lost_group_never_wins() -> None:
    """All biased scores are negative: masking lost groups with 0 would choose among those."""
    config = _config(num_limited_groups=1, num_experts_per_tok=2)
    result = routing.route(_scores(1), BIASES["negative"].astype(np.float32), config)
    groups = result.expert_ids_TK // 3
    chex.assert_trees_all_equal(groups[:, 0], groups[:, 1])
    # Group 1 has the best two, group 2 the single best: the sum of two decides.
    scores = jnp.array([[0.1, 0.1, 0.1, 0.6, 0.6, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1]])
    result = routing.route(scores, jnp.zeros(12), config)
    assert sorted(result.expert_ids_TK[0].tolist()) == [3, 4]


def test_lost_groups_lose_against_scores_of_zero() -> None:
    """Softmax underflows to 0: lost groups masked with 0, of lower index, would win the tie."""
    config = _config(
        topk_method="group_limited_greedy", num_limited_groups=1, num_experts_per_tok=3
    )
    logits = jnp.full((1, 12), -200.0).at[0, 8].set(0.0).at[0, 0].set(-10.0)
    result = routing.route(routing.affinities(logits, "softmax"), None, config)
    assert result.expert_ids_TK[0].tolist() == [8, 6, 7]


def test_without_renormalisation_weights_are_the_scores() -> None:
    """Mixtral's weights, softmax over the chosen logits, are its renormalised softmax."""
    logits = np.random.default_rng(5).normal(size=(TOKENS, 12)).astype(np.float32)
    scores = routing.affinities(jnp.asarray(logits), "softmax")
    chex.assert_trees_all_close(jnp.sum(scores, axis=-1), np.ones(TOKENS), rtol=1e-6)
    plain = dict(topk_method="greedy", num_limited_groups=4, routed_scaling_factor=1.0)
    best = np.argsort(-logits, axis=1)[:, :3]
    exponentials = np.exp(logits.astype(np.float64))
    for renormalised in (True, False):
        result = routing.route(scores, None, _config(norm_topk_prob=renormalised, **plain))
        chex.assert_trees_all_equal(result.expert_ids_TK, best.astype(np.int32))
        expected = np.take_along_axis(exponentials, best, axis=1)
        total = (expected if renormalised else exponentials).sum(axis=1, keepdims=True)
        chex.assert_trees_all_close(result.weights_TK, expected / total, rtol=1e-5)


def test_sigmoid_affinities() -> None:
    logits = jnp.array([[-200.0, -1.0, 0.0, 3.0, 200.0]])
    expected = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    chex.assert_trees_all_close(routing.affinities(logits, "sigmoid"), expected, atol=1e-7)


def test_bias_steers_the_choice_only() -> None:
    scores, config = _scores(2), _config(num_expert_groups=1, num_limited_groups=1)
    bias = np.zeros(12, np.float32)
    bias[5] = 10
    result = routing.route(scores, bias, config)
    chex.assert_trees_all_equal(result.expert_ids_TK[:, 0], jnp.full(TOKENS, 5))
    kept = np.take_along_axis(scores, np.asarray(result.expert_ids_TK), axis=1)
    chex.assert_trees_all_close(
        result.weights_TK, 2.5 * kept / kept.sum(1, keepdims=True), rtol=1e-6
    )
    gradient = jax.grad(lambda b: jnp.sum(routing.route(scores, b, config).weights_TK ** 2))(bias)
    chex.assert_trees_all_equal(gradient, np.zeros(12))


def test_scores_get_the_gradient_of_the_weights() -> None:
    scores, config = _scores(3, tokens=2), _config()
    direction = np.random.default_rng(4).normal(size=(2, 3))
    gradient = jax.grad(
        lambda s: jnp.sum(routing.route(s, jnp.zeros(12), config).weights_TK * direction)
    )(scores)
    for t in range(2):
        ids = _chosen(scores[t], np.zeros(12), config)
        chosen = scores[t, ids].astype(np.float64)
        expected = np.zeros(12)
        # d/ds_j of factor * s_k / sum s
        for j in range(3):
            for k in range(3):
                slope = (float(j == k) * chosen.sum() - chosen[k]) / chosen.sum() ** 2
                expected[ids[j]] += direction[t, k] * 2.5 * slope
        chex.assert_trees_all_close(gradient[t], expected, atol=1e-5)


def test_expert_load_counts_ids_in_range() -> None:
    ids = jnp.array([[0, 3], [3, 1], [4, 4], [-1, 3]])
    load = routing.expert_load(ids, 4)
    chex.assert_trees_all_equal(load, jnp.array([1, 1, 0, 3], jnp.int32))
