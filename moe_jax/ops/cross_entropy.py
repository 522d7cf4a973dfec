"""The loss of next-token prediction."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over tokens of weight * -log p(target), in nats.

    A sum and no mean: the caller divides by the weights of the whole global batch, so that
    micro-batches of unequal weight add up to the right gradient.

    Args:
      logits: [..., vocab] float32.
      targets: [...] int32.
      weights: [...] float32, 0 where there is nothing to predict.
    Returns:
      [] float32.
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum and no gather: its gradient needs no scatter.
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return jnp.sum(weights * (log_normalizer - target_logits))
