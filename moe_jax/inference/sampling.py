"""How the next token is chosen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import UserError


class Sampling(NamedTuple):
    """temperature: divides the logits; 0 takes the best token.
    top_k: draws among so many tokens; 0 for all.
    top_p: of these, among the fewest whose probabilities sum to at least this.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Raises:
        ValueError: what cannot be drawn from.
        """
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be at least 0; 0 is greedy")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be at least 0; 0 draws among all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")


GREEDY = Sampling()


def choose(
    logits_BV: jax.Array,
    rows_B: jax.Array,
    positions_B: jax.Array,
    seed: jax.Array,
    sampling: Sampling,
) -> jax.Array:
    """One token per row: [batch] int32.

    A draw depends on seed, row and position alone, so neither on other rows nor on the mesh.

    Args:
      logits_BV: [batch, vocab] float32.
      rows_B: [batch] int32, numbers of the rows.
      positions_B: [batch] int32, of the tokens to choose.
      seed: [] uint32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = candidates(logits_BV / sampling.temperature, sampling)

    def draw(logits_V, row, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(logits_BV, rows_B, positions_B).astype(jnp.int32)


def candidates(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits with -inf for tokens that `top_k` or `top_p` leave out.

    Of equal logits, those of the smaller ids are kept first.
    """
    vocab = logits_BV.shape[-1]
    top_k = min(sampling.top_k or vocab, vocab)
    if top_k == vocab and sampling.top_p == 1:
        return logits_BV
    best_BK, ids_BK = jax.lax.top_k(logits_BV, top_k)
    shares_BK = jax.nn.softmax(best_BK, axis=-1)
    # A token stays while those before it sum to less; so the best one always does.
    before_BK = jnp.cumsum(shares_BK, axis=-1) - shares_BK
    best_BK = jnp.where(before_BK < sampling.top_p, best_BK, -jnp.inf)
    nothing_BV = jnp.full_like(logits_BV, -jnp.inf)
    return jax.vmap(lambda row, ids, best: row.at[ids].set(best))(nothing_BV, ids_BK, best_BK)
