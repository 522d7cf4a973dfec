"""The loss, against float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.cross_entropy import cross_entropy

VOCAB = 11


def _inputs(scale: float = 2.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(3, 4, VOCAB))).astype(np.float32)
    targets = rng.integers(0, VOCAB, (3, 4)).astype(np.int32)
    weights = rng.uniform(0.5, 2, (3, 4)).astype(np.float32)
    weights[0, 1] = weights[2] = 0
    return logits, targets, weights


def _softmax(row: np.ndarray) -> np.ndarray:
    exponentials = np.exp(row.astype(np.float64) - row.max())
    return exponentials / exponentials.sum()


def test_value() -> None:
    logits, targets, weights = _inputs()
    expected = -sum(weights[i] * np.log(_softmax(logits[i])[targets[i]]) for i in np.ndindex(3, 4))
    result = cross_entropy(logits, targets, weights)
    chex.assert_shape(result, ())
    chex.assert_trees_all_close(result, expected, rtol=1e-6)


def test_gradient_is_weighted_softmax_less_one_hot() -> None:
    logits, targets, weights = _inputs()
    expected = np.zeros(logits.shape)
    for i in np.ndindex(3, 4):
        expected[i] = weights[i] * (_softmax(logits[i]) - np.eye(VOCAB)[targets[i]])
    gradient = jax.grad(cross_entropy)(logits, targets, weights)
    chex.assert_trees_all_close(gradient, expected, atol=1e-6)


def test_weight_zero_hides_the_target_and_the_logits() -> None:
    logits, targets, weights = _inputs()
    changed, others = logits.copy(), targets.copy()
    changed[2], others[2] = 7 * logits[2] - 3, VOCAB - 1 - targets[2]
    chex.assert_trees_all_equal(
        cross_entropy(changed, others, weights), cross_entropy(logits, targets, weights)
    )
    chex.assert_trees_all_equal(
        jax.grad(cross_entropy)(changed, others, weights)[2], np.zeros((4, VOCAB))
    )


def test_large_logits() -> None:
    """Neither overflow nor a shift of all logits changes the loss."""
    logits, targets, weights = _inputs()
    logits = np.round(logits * 64) / 64  # exact when shifted
    expected = cross_entropy(logits, targets, weights)
    for shift in (1e4, -1e4):
        shifted = cross_entropy(logits + np.float32(shift), targets, weights)
        chex.assert_trees_all_close(shifted, expected, rtol=1e-3)
    certain = jnp.where(jnp.arange(VOCAB) == 3, 3e38, 0.0)
    loss, gradient = jax.value_and_grad(cross_entropy)(certain, jnp.int32(3), jnp.float32(1))
    chex.assert_trees_all_equal((loss, gradient), (jnp.float32(0), jnp.zeros(VOCAB)))
