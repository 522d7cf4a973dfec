"""Attention of new tokens to a cache of all tokens so far, which lies by position.

Shapes: B batch, L new tokens, M slots of the cache, H query heads, G key/value heads, R = H / G
query heads per key/value head, Q query/key head dim, V value head dim; of latent attention, N and P
the parts of Q without and with rotation, C the latent dim.

A row's own new tokens are in the cache already. Slots behind a query's position are not seen, so
whatever they hold does not count.
"""

import jax
import jax.numpy as jnp

from moe_jax.ops.attention import masked_attention


def grouped_query_attention(
    q_BLHQ: jax.Array,
    k_BMGQ: jax.Array,
    v_BMGV: jax.Array,
    positions_BL: jax.Array,
    scale: float,
) -> jax.Array:
    """softmax(scale * q k^T) v over the slots up to each query's position.

    Args:
      q_BLHQ: [batch, new tokens, heads, dim].
      k_BMGQ, v_BMGV: [batch, slots, key/value heads, dim]; neighbouring query heads share one.
      positions_BL: [batch, new tokens] int32.
      scale: factor on the scores.
    Returns:
      [batch, new tokens, heads, v dim] in v's dtype.
    """
    seen_BLM = _seen(positions_BL, k_BMGQ.shape[1])
    return masked_attention(q_BLHQ, k_BMGQ, v_BMGV, seen_BLM, scale)


def absorbed_attention(
    q_nope_BLHN: jax.Array,
    q_rope_BLHP: jax.Array,
    latent_BMC: jax.Array,
    k_rope_BMP: jax.Array,
    up_key_CHN: jax.Array,
    up_value_CHV: jax.Array,
    positions_BL: jax.Array,
    scale: float,
) -> jax.Array:
    """Latent attention in the latent's space (DeepSeek-V2, section 2.1.2 and appendix C).

    Queries go into that space and results come out of it, so neither keys nor values of the cached
    tokens are ever made: q (W c) = (q W) c.

    Args:
      q_nope_BLHN, q_rope_BLHP: [batch, new tokens, heads, dim].
      latent_BMC, k_rope_BMP: [batch, slots, dim], shared by all heads.
      up_key_CHN, up_value_CHV: what makes keys and values of a latent, whole on every device.
      positions_BL, scale: as above.
    Returns:
      [batch, new tokens, heads, v dim] in the latent's dtype.
    """
    q_latent_BLHC = jnp.einsum("blhn,chn->blhc", q_nope_BLHN, up_key_CHN)
    wide = jnp.float32
    scores = jnp.einsum("blhc,bmc->bhlm", q_latent_BLHC, latent_BMC, preferred_element_type=wide)
    scores += jnp.einsum("blhp,bmp->bhlm", q_rope_BLHP, k_rope_BMP, preferred_element_type=wide)
    seen_BLM = _seen(positions_BL, latent_BMC.shape[1])
    scores = jnp.where(seen_BLM[:, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(latent_BMC.dtype)
    latents_BLHC = jnp.einsum("bhlm,bmc->blhc", weights, latent_BMC)
    return jnp.einsum("blhc,chv->blhv", latents_BLHC, up_value_CHV)


def absorbed_attention_reference(
    q_nope_BLHN: jax.Array,
    q_rope_BLHP: jax.Array,
    latent_BMC: jax.Array,
    k_rope_BMP: jax.Array,
    up_key_CHN: jax.Array,
    up_value_CHV: jax.Array,
    positions_BL: jax.Array,
    scale: float,
) -> jax.Array:
    """The same with keys and values made for every slot, for tests."""
    k_nope_BMHN = jnp.einsum("bmc,chn->bmhn", latent_BMC, up_key_CHN)
    k_rope_BMHP = jnp.broadcast_to(
        k_rope_BMP[:, :, None], (*k_nope_BMHN.shape[:3], k_rope_BMP.shape[-1])
    )
    return grouped_query_attention(
        jnp.concatenate([q_nope_BLHN, q_rope_BLHP], axis=-1),
        jnp.concatenate([k_nope_BMHN, k_rope_BMHP], axis=-1),
        jnp.einsum("bmc,chv->bmhv", latent_BMC, up_value_CHV),
        positions_BL,
        scale,
    )


def _seen(positions_BL: jax.Array, slots: int) -> jax.Array:
    """The slots that each query sees: [batch, new tokens, slots] bool."""
    return jnp.arange(slots) <= positions_BL[..., None]
