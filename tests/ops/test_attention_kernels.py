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
from emulated import make_mesh, quick_jit
from jax.experimental import pallas as pl

from moe_jax.config import UserError
from moe_jax.ops import attention_gpu, attention_tpu
from moe_jax.ops.attention import attention, attention_reference
from moe_jax.ops.attention_kernels import local_attention, needed_blocks
from moe_jax.sharding import BATCH

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


@functools.cache
def _compiled(kernels):
    """Values and gradients of kernels or, for None, of the reference."""

    def loss(q, k, v, ids):
        if kernels is None:
            values = attention_reference(q, k, v, ids, SCALE)
        else:
            values = local_attention(q, k, v, ids, scale=SCALE, kernels=kernels)
        return jnp.sum(jnp.sin(values.astype(jnp.float32))), values

    return quick_jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def test_rows_come_in_groups_whose_pairs_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tpu, "BLOCK", 8)
    monkeypatch.setattr(attention_tpu, "LANES", 8)
    monkeypatch.setattr(attention_tpu, "MOST_PAIRS", 2 * 15)  # of two rows of five blocks
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    inputs = *_inputs(), SEGMENTS["long"]
    result = _compiled.__wrapped__(attention_tpu.KERNELS)(*inputs)
    chex.assert_trees_all_close(result, _compiled(None)(*inputs), atol=2e-5, rtol=2e-5)

    monkeypatch.setattr(attention_tpu, "MOST_PAIRS", 14)
    with pytest.raises(UserError, match="rows of 40 tokens are too long.*attention=portable"):
        _compiled.__wrapped__(attention_tpu.KERNELS)(*inputs)


@pytest.mark.parametrize("name", SEGMENTS)
def test_values_and_gradients_equal_the_reference(backend: ModuleType, name: str) -> None:
    inputs = *_inputs(), SEGMENTS[name]
    result, expected = _compiled(backend.KERNELS)(*inputs), _compiled(None)(*inputs)
    chex.assert_trees_all_close(result, expected, atol=2e-5, rtol=2e-5)


def test_bfloat16_is_close_where_each_head_has_its_own_keys(backend: ModuleType) -> None:
    narrow = _inputs(jnp.bfloat16, groups=HEADS)
    wide = [x.astype(jnp.float32) for x in narrow]
    result = _compiled(backend.KERNELS)(*narrow, SEGMENTS["long"])
    expected = _compiled(None)(*wide, SEGMENTS["long"])
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(result))
    # 2^-8 is bfloat16's rounding: of weights, of the scores' gradients and of the results.
    result = jax.tree.map(lambda x: x.astype(jnp.float32), result)
    chex.assert_trees_all_close(result, expected, atol=4e-2, rtol=4e-2)


def test_what_documents_or_causality_rule_out_is_not_computed(backend: ModuleType) -> None:
    # Documents of 16, 16 and 5: whole blocks, but for the last. Whoever multiplies by what is in
    # the middle one, be it by a weight of 0, is no number.
    ids = _segments(*[[16, 16, 5]] * ROWS)
    poisoned = [x.at[:, 16:32].set(jnp.nan) for x in _inputs()]
    result = _compiled(backend.KERNELS)(*poisoned, ids)
    expected = _compiled(None)(*_inputs(), ids)
    for there in slice(0, 16), slice(32, 37):
        others = jax.tree.map(lambda x, there=there: x[:, there], (result, expected))
        chex.assert_trees_all_close(*others, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("by_key", [False, True])
def test_tpu_steps_over_the_needed_pairs_alone(by_key: bool) -> None:
    packed = [SEGMENTS[name] for name in ("long", "short", "padded")]
    ids = np.pad(np.concatenate(packed), ((0, 0), (0, 3)))
    order = attention_tpu.Order(10, by_key)
    pairs, count = map(np.asarray, quick_jit(order.pack)(ids))
    walked = list(zip(*order.unpack(pairs[:count]), strict=True))
    assert walked == sorted(walked, key=lambda pair: (pair[0], pair[1 + by_key], pair[2 - by_key]))
    assert set(walked) == set(zip(*np.nonzero(np.asarray(needed_blocks(ids, 4))), strict=True))
    assert np.all(pairs[count:] == attention_tpu.END)


def test_gpu_steps_from_the_first_needed_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu, "STEP", 4)
    # Documents of 9, 1 and 22 positions, then 8 of padding.
    ids = np.repeat([1, 2, 3, 0], [9, 1, 22, 8]).astype(np.int32)[None]
    assert attention_gpu.first_step(ids, 8).tolist() == [[0, 0, 2, 2, 8]]
    assert attention_gpu.end_step(ids, 8).tolist() == [[3, 8, 8, 8, 10]]


def test_gpu_blocks_fit_the_shared_memory() -> None:
    def block_of(qk, v, dtype):
        shapes = [jax.ShapeDtypeStruct((1, 512, 1, dim), dtype) for dim in (qk, v)]
        return attention_gpu.block_of(*shapes)

    assert block_of(192, 128, jnp.bfloat16) == 128
    assert block_of(192, 128, jnp.float32) == 64
    assert block_of(256, 256, jnp.bfloat16) == 64


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_gpu_kernels_become_triton_programs_under_explicit_axes() -> None:
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = make_mesh(data=2, expert=4).abstract_mesh.update(abstract_device=gpu)

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, ids, SCALE, "gpu").astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        rows = jax.NamedSharding(mesh, BATCH)
        shapes = [(8, 200, HEADS, 192), (8, 200, GROUPS, 192), (8, 200, GROUPS, 128)]
        inputs = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=rows) for x in shapes]
        ids = jax.ShapeDtypeStruct((8, 200), jnp.int32, sharding=rows)
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*inputs, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


def test_needed_blocks_by_hand() -> None:
    # Blocks of 4: documents of 4, 4 and 8; one of 16; 6 and 2, and padding as the last document.
    ids = np.array([[1] * 4 + [2] * 4 + [3] * 8, [1] * 16, [1] * 6 + [2] * 2 + [0] * 8], np.int32)
    assert needed_blocks(ids, 4).astype(int).tolist() == [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
    ]
