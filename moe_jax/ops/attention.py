"""Causal attention within documents.

Shapes: B batch, L and M query and key length, H query heads, G key/value heads, R = H / G query
heads per key/value head, Q query/key head dim, V value head dim.
"""

import jax
import jax.numpy as jnp

from moe_jax.sharding import P


def attention(
    q_BLHQ: jax.Array,
    k_BLGQ: jax.Array,
    v_BLGV: jax.Array,
    segment_ids_BL: jax.Array,
    scale: float,
) -> jax.Array:
    """softmax(scale * q k^T) v over earlier positions of the same segment.

    Products take the operands as they come and sum in float32; the softmax is float32.

    Args:
      q_BLHQ: [batch, length, heads, qk dim].
      k_BLGQ: [batch, length, key/value heads, qk dim]; neighbouring query heads share one of them.
      v_BLGV: [batch, length, key/value heads, v dim]; its head dim may differ.
      segment_ids_BL: [batch, length] int32; a position attends to its own id only.
      scale: factor on the scores.
    Returns:
      [batch, length, heads, v dim] in v's dtype.
    """
    batch, length, heads, dim = q_BLHQ.shape
    groups = k_BLGQ.shape[2]
    q_BLGRQ = reshape_rows(q_BLHQ, (batch, length, groups, heads // groups, dim))
    scores = jnp.einsum("blgrq,bmgq->bgrlm", q_BLGRQ, k_BLGQ, preferred_element_type=jnp.float32)
    causal = jnp.tril(jnp.ones((length, length), jnp.bool))
    same = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    # A position always sees itself, so no row is masked whole.
    scores = jnp.where((causal & same)[:, None, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BLGV.dtype)
    values = jnp.einsum("bgrlm,bmgv->blgrv", weights, v_BLGV)
    return reshape_rows(values, (batch, length, heads, v_BLGV.shape[-1]))


def reshape_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x.reshape(shape), which alone forgets how the first dim is split where that has one row."""
    spec = jax.typeof(x).sharding.spec
    if not spec or spec[0] is None:
        return x.reshape(shape)
    return jnp.reshape(x, shape, out_sharding=P(spec[0]))
