"""Rotary position embedding, plain or stretched to lengths beyond those of pre-training."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import RopeConfig


class Rotary(NamedTuple):
    """Cosine and sine of every position's angles: [batch, length, dim / 2] float32 each."""

    cos: jax.Array
    sin: jax.Array


def rotary_angles(positions_BL: jax.Array, dim: int, config: RopeConfig) -> Rotary:
    """Angles position * frequency for each pair of dims (Su et al. 2021, section 3.2.2).

    Args:
      positions_BL: [batch, length] int32.
      dim: the rotary dim, even.
      config: base, stretching and its parameters.
    """
    angles = positions_BL[..., None].astype(jnp.float32) * frequencies(dim, config)
    factor = _attention_factor(config) if config.scaling == "yarn" else 1.0
    return Rotary(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def apply_rotary(x_BLHR: jax.Array, rotary: Rotary, interleaved: bool) -> jax.Array:
    """Turns each pair of dims by its position's angle, in float32.

    Args:
      x_BLHR: [batch, length, heads, rotary dim], any float dtype, which the result keeps.
      interleaved: pair i is (2i, 2i + 1), as DeepSeek stores it; else (i, i + dim / 2), as Llama.
    """
    half = x_BLHR.shape[-1] // 2
    shape = (half, 2) if interleaved else (2, half)
    axis = -1 if interleaved else -2
    pairs = x_BLHR.astype(jnp.float32).reshape(*x_BLHR.shape[:-1], *shape)
    first, second = (jax.lax.index_in_dim(pairs, i, axis, keepdims=False) for i in (0, 1))
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=axis)
    return turned.reshape(x_BLHR.shape).astype(x_BLHR.dtype)


def frequencies(dim: int, config: RopeConfig) -> np.ndarray:
    """Radians per position of each pair: [dim / 2] float32.

    theta^(-2i / dim), and with `scaling` the lower ones divided by `factor`.
    """
    plain = config.theta ** (-np.arange(0, dim, 2) / dim)
    stretched = plain / config.factor
    if config.scaling == "yarn":
        share = _yarn_share(dim, config)
    elif config.scaling == "llama3":
        share = _llama3_share(plain, config)
    else:
        assert config.scaling == "none", config.scaling
        share = np.zeros_like(plain)
    return (share * stretched + (1 - share) * plain).astype(np.float32)


def score_correction(config: RopeConfig) -> float:
    """DeepSeek's factor on attention scores under YaRN: (0.1 * mscale_all_dim * ln(s) + 1)^2."""
    if config.scaling != "yarn" or not config.mscale_all_dim:
        return 1.0
    return _mscale(config.factor, config.mscale_all_dim) ** 2


def _yarn_share(dim: int, config: RopeConfig) -> np.ndarray:
    """How far each pair is stretched, 0 to 1: a ramp over the pairs (Peng et al. 2023, 3.2)."""

    def pair_that_turns(times: float) -> float:
        """The pair that turns so many times over the original length."""
        length = config.original_max_position_embeddings
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    return np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)


def _llama3_share(plain: np.ndarray, config: RopeConfig) -> np.ndarray:
    """The same for Llama 3: a ramp over how often each pair turns in the original length."""
    turns = plain * config.original_max_position_embeddings / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    return np.clip((high - turns) / (high - low), 0, 1)


def _attention_factor(config: RopeConfig) -> float:
    """YaRN's factor on cosine and sine."""
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _mscale(config.factor, config.mscale) / _mscale(config.factor, config.mscale_all_dim)
    return _mscale(config.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
