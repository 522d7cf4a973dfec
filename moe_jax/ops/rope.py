"""Rotary position embedding with interleaved pairs, as DeepSeek-V2 and -V3 store it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotary(NamedTuple):
    """Cosine and sine of every position's angles: [batch, length, dim / 2] float32 each."""

    cos: jax.Array
    sin: jax.Array


def rotary_angles(positions_BL: jax.Array, dim: int, theta: float) -> Rotary:
    """Angles position * theta^(-2i / dim) for pair i (Su et al. 2021, section 3.2.2).

    Args:
      positions_BL: [batch, length] int32.
      dim: the rotary dim, even.
      theta: base of the wavelengths.
    """
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = positions_BL[..., None].astype(jnp.float32) * frequencies
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def apply_rotary(x_BLHR: jax.Array, rotary: Rotary) -> jax.Array:
    """Turns each pair (x[2i], x[2i + 1]) by its position's angle, in float32.

    Args:
      x_BLHR: [batch, length, heads, rotary dim], any float dtype, which the result keeps.
    """
    pairs = x_BLHR.astype(jnp.float32).reshape(*x_BLHR.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BLHR.shape).astype(x_BLHR.dtype)
