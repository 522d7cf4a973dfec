"""Causal attention within documents.

Shapes: B batch, L and M query and key length, H heads, Q query/key head dim, V value head dim.
"""

import jax
import jax.numpy as jnp


def attention(
    q_BLHQ: jax.Array,
    k_BLHQ: jax.Array,
    v_BLHV: jax.Array,
    segment_ids_BL: jax.Array,
    scale: float,
) -> jax.Array:
    """softmax(scale * q k^T) v over earlier positions of the same segment.

    Products take the operands as they come and sum in float32; the softmax is float32.

    Args:
      q_BLHQ, k_BLHQ: [batch, length, heads, qk dim].
      v_BLHV: [batch, length, heads, v dim]; its head dim may differ.
      segment_ids_BL: [batch, length] int32; a position attends to its own id only.
      scale: factor on the scores.
    Returns:
      [batch, length, heads, v dim] in v's dtype.
    """
    length = q_BLHQ.shape[1]
    scores = jnp.einsum("blhq,bmhq->bhlm", q_BLHQ, k_BLHQ, preferred_element_type=jnp.float32)
    causal = jnp.tril(jnp.ones((length, length), jnp.bool))
    same = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    # A position always sees itself, so no row is masked whole.
    scores = jnp.where((causal & same)[:, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BLHV.dtype)
    return jnp.einsum("bhlm,bmhv->blhv", weights, v_BLHV)
