"""Text from a model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax import sharding

Tree = Any


def sample(
    model: Callable[[Tree, jax.Array], jax.Array],
    state: Tree,
    prompt: np.ndarray,
    *,
    num_tokens: int,
    mesh: Mesh,
    seed: int,
    temperature: float = 0.7,
) -> np.ndarray:
    """Continues a prompt, once per row that the mesh's batch axes can hold.

    Each token recomputes the whole prefix: this is for a glance at what training has reached.

    Args:
      model: (state, tokens [rows, length] int32) -> logits [rows, length, vocab] float32.
      state: passed on to `model`.
      prompt: [tokens] int32.
      num_tokens: to add.
      seed: of the draw.
      temperature: divides the logits.
    Returns:
      [rows, prompt + num_tokens] int32.
    """
    rows = sharding.num_shards(dict(mesh.shape), sharding.BATCH_AXES)
    start = np.zeros((rows, len(prompt) + num_tokens), np.int32)
    start[:, : len(prompt)] = prompt
    by_rows = NamedSharding(mesh, sharding.BATCH)

    def one_token(at, carry):
        state, tokens, key = carry
        key, draw = jax.random.split(key)
        logits = jax.lax.dynamic_index_in_dim(model(state, tokens), at - 1, axis=1, keepdims=False)
        # The draw sees every row, so that it does not depend on the mesh.
        logits = sharding.gather(logits)
        chosen = jax.random.categorical(draw, logits / temperature).astype(jnp.int32)
        chosen = jax.sharding.reshard(chosen, sharding.BATCH)
        return state, tokens.at[:, at].set(chosen), key

    @jax.jit
    def run(state, tokens, key):
        carry = (state, tokens, key)
        _, tokens, _ = jax.lax.fori_loop(len(prompt), tokens.shape[1], one_token, carry)
        return sharding.gather(tokens)

    tokens = jax.make_array_from_callback(start.shape, by_rows, lambda index: start[index])
    return np.asarray(run(state, tokens, jax.random.key(seed)))
