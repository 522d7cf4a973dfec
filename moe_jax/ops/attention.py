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
    length = q_BLHQ.shape[1]
    causal = jnp.tril(jnp.ones((length, length), jnp.bool))
    same = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    return masked_attention(q_BLHQ, k_BLGQ, v_BLGV, causal & same, scale)


def masked_attention(
    q_BLHQ: jax.Array,
    k_BMGQ: jax.Array,
    v_BMGV: jax.Array,
    seen_BLM: jax.Array,
    scale: float,
) -> jax.Array:
    """softmax(scale * q k^T) v over the keys that each query sees; at least one each.

    Args:
      q_BLHQ: [batch, length, heads, qk dim].
      k_BMGQ, v_BMGV: [batch, keys, key/value heads, dim].
      seen_BLM: [batch, length, keys] bool.
      scale: factor on the scores.
    Returns:
      [batch, length, heads, v dim] in v's dtype.
    """
    batch, length, heads, dim = q_BLHQ.shape
    groups = k_BMGQ.shape[2]
    q_BLGRQ = _reshape_rows(q_BLHQ, (batch, length, groups, heads // groups, dim))
    scores = jnp.einsum("blgrq,bmgq->bgrlm", q_BLGRQ, k_BMGQ, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_BLM[:, None, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BMGV.dtype)
    values = jnp.einsum("bgrlm,bmgv->blgrv", weights, v_BMGV)
    return _reshape_rows(values, (batch, length, heads, v_BMGV.shape[-1]))


def _reshape_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x.reshape(shape), which alone forgets how the first dim is split where that has one row."""
    spec = jax.typeof(x).sharding.spec
    if not spec or spec[0] is None:
        return x.reshape(shape)
    return jnp.reshape(x, shape, out_sharding=P(spec[0]))
