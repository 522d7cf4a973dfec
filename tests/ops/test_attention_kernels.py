"""Attention's kernels for TPU and GPU: interpreted here, and compiled for machines elsewhere.

Interpreted kernels run outside of a `shard_map`, whose check of what varies by device they cannot
take; compiled, they run in one.
"""

import functools
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from moe_jax.ops import attention_gpu, attention_tpu
from moe_jax.ops.attention import attention_reference
from moe_jax.ops.attention_kernels import local_attention, needed_blocks

SCALE = 0.37
ROWS, HEADS, GROUPS, QK, V = 3, 4, 2, 24, 16


@pytest.fixture(params=[attention_tpu, attention_gpu], ids=["tpu", "gpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A back end, interpreted, with blocks of 8 positions or, on GPU, of two steps of 4."""
    monkeypatch.setattr(request.param, "BLOCK", 8)
    monkeypatch.setattr(attention_gpu, "STEP", 4)
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    return request.param


def _segments(*rows: list[int]) -> np.ndarray:
    """Rows of documents of these lengths, filled up with padding to 37 positions."""
    ids = np.zeros((len(rows), 37), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        documents = np.repeat(np.arange(len(lengths)) + 1, lengths)
        row[: len(documents)] = documents
    return ids


# 37 is no multiple of a block.
SEGMENTS = {
    "long": _segments([37], [36, 1], [8, 29]),
    "short": _segments([1] * 37, [3] * 12, [8] * 4),
    "padded": _segments([], [1], [5, 11, 2]),
    # Ids that neither rise nor stay together.
    "any": np.random.default_rng(0).integers(0, 4, (ROWS, 37)).astype(np.int32),
}


def _inputs(dtype=np.float32, groups=GROUPS) -> list[jax.Array]:
    rng = np.random.default_rng(1)
    sizes = [(HEADS, QK), (groups, QK), (groups, V)]
    return [jnp.asarray(rng.normal(size=(ROWS, 37, *size)), dtype) for size in sizes]


@functools.lru_cache(maxsize=None)
def _compiled(kernels):
    """Values and gradients of kernels or, for None, of the reference."""

    def loss(q, k, v, ids):
        if kernels is None:
            values = attention_reference(q, k, v, ids, SCALE)
        else:
            values = local_attention(q, k, v, ids, scale=SCALE, kernels=kernels)
        return jnp.sum(jnp.sin(values.astype(jnp.float32))), values

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("name", SEGMENTS)
def test_values_and_gradients_equal_the_reference(backend: ModuleType, name: str) -> None:
    inputs = *_inputs(), SEGMENTS[name]
    result, expected = _compiled(backend.KERNELS)(*inputs), _compiled(None)(*inputs)
    chex.assert_trees_all_close(result, expected, atol=2e-5, rtol=2e-5)


def test_each_head_may_have_its_own_keys(backend: ModuleType) -> None:
    inputs = *_inputs(groups=HEADS), SEGMENTS["short"]
    result, expected = _compiled(backend.KERNELS)(*inputs), _compiled(None)(*inputs)
    chex.assert_trees_all_close(result, expected, atol=2e-5, rtol=2e-5)


def test_bfloat16_is_close_and_keeps_its_dtype(backend: ModuleType) -> None:
    narrow = _inputs(jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in narrow]
    result = _compiled(backend.KERNELS)(*narrow, SEGMENTS["long"])
    expected = _compiled(None)(*wide, SEGMENTS["long"])
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(result))
    # 2^-8 is bfloat16's rounding: of weights, of the scores' gradients and of the results.
    result = jax.tree.map(lambda x: x.astype(jnp.float32), result)
    chex.assert_trees_all_close(result, expected, atol=4e-2, rtol=4e-2)
