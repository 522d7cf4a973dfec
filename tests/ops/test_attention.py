"""Attention within documents, against loops and against all scores of a row at once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, quick_jit

from moe_jax.ops import attention as attention_module
from moe_jax.ops.attention import attention, attention_reference
from moe_jax.sharding import BATCH

# Two query heads share a head of keys and values; two head dims that differ.
ROWS, LENGTH, HEADS, GROUPS, QK, V = 2, 7, 4, 2, 6, 5
SCALE = 0.37
SEGMENTS = {
    "one document": [[1] * 7, [1] * 7],
    "packed": [[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 3, 3, 3, 3]],
    "padded": [[1, 1, 1, 1, 0, 0, 0], [0] * 7],
}


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh()):
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3: a row of 7 is two of them and a part."""
    monkeypatch.setattr(attention_module, "BLOCK", 3)


def _place(*arrays):
    """Arrays on the current mesh, split as activations are."""
    return jax.device_put(arrays, jax.NamedSharding(jax.sharding.get_mesh(), BATCH))


def _inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    sizes = [(HEADS, QK), (GROUPS, QK), (GROUPS, V)]
    return tuple(rng.normal(size=(ROWS, LENGTH, *size)).astype(np.float32) for size in sizes)


def _by_loops(q, k, v, segments, scale) -> np.ndarray:
    result = np.zeros((*q.shape[:3], V))
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = [m for m in range(t + 1) if segments[b, m] == segments[b, t]]
        g = h // 2
        exponentials = np.array([np.exp(scale * np.dot(q[b, t, h], k[b, m, g])) for m in seen])
        for weight, m in zip(exponentials / exponentials.sum(), seen, strict=True):
            result[b, t, h] += weight * v[b, m, g]
    return result


def _naive(q, k, v, segments, scale) -> jax.Array:
    """One query at a time over the keys that it sees, for gradients."""
    rows = []
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = np.array([m for m in range(t + 1) if segments[b, m] == segments[b, t]])
        exponentials = jnp.exp(scale * (k[b, seen, h // 2] @ q[b, t, h]))
        rows.append(exponentials @ v[b, seen, h // 2] / jnp.sum(exponentials))
    return jnp.stack(rows).reshape(*q.shape[:3], V)


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.usefixtures("small_blocks")
def test_forward_equals_loops(name: str) -> None:
    q, k, v = _inputs()
    segments = np.array(SEGMENTS[name], np.int32)
    result = attention(*_place(q, k, v, segments), SCALE)
    chex.assert_trees_all_close(result, _by_loops(q, k, v, segments, SCALE), atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_equal_those_of_loops() -> None:
    q, k, v = _inputs(1)
    segments = np.array([SEGMENTS["packed"][0], SEGMENTS["padded"][0]], np.int32)
    direction = np.random.default_rng(2).normal(size=(*q.shape[:3], V)).astype(np.float32)

    placed_segments, placed_direction = _place(segments, direction)

    def blocks(q, k, v):
        return jnp.sum(attention(q, k, v, placed_segments, SCALE) * placed_direction)

    def naive(q, k, v):
        return jnp.sum(_naive(q, k, v, segments, SCALE) * direction)

    result = jax.jit(jax.grad(blocks, argnums=(0, 1, 2)))(*_place(q, k, v))
    expected = jax.jit(jax.grad(naive, argnums=(0, 1, 2)))(q, k, v)
    chex.assert_trees_all_close(result, expected, atol=1e-5)


def test_large_scores_stay_finite() -> None:
    q, k, v, segments = _place(*_inputs(3), np.ones((ROWS, LENGTH), np.int32))
    result, gradient = jax.value_and_grad(lambda q: jnp.sum(attention(q, k, v, segments, 1e4)))(q)
    chex.assert_tree_all_finite((result, gradient))


def test_bfloat16_is_close_and_keeps_its_dtype() -> None:
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in _inputs(4)]
    segments = np.array(SEGMENTS["packed"], np.int32)
    result = attention(*_place(*narrow, segments), SCALE)
    assert result.dtype == jnp.bfloat16
    expected = _by_loops(*(np.asarray(x, np.float64) for x in narrow), segments, SCALE)
    # 2^-8 is bfloat16's rounding; weights and result are rounded once each.
    chex.assert_trees_all_close(result.astype(jnp.float32), expected, atol=2e-2, rtol=2e-2)


def _value_and_gradients(function, *inputs):
    def loss(q, k, v, segments):
        return jnp.sum(jnp.sin(function(q, k, v, segments, SCALE).astype(jnp.float32)))

    return quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*_place(*inputs))


def _random_rows(seed: int, rows: int, length: int) -> tuple[np.ndarray, ...]:
    """Inputs and segment ids: documents of random lengths, some rows with padding at the end."""
    rng = np.random.default_rng(seed)
    sizes = [(HEADS, QK), (GROUPS, QK), (GROUPS, V)]
    ids = np.cumsum(rng.random((rows, length)) < 0.1, axis=1) + 1
    ids[::2, length - length // 3 :] = 0
    inputs = (rng.normal(size=(rows, length, *size)).astype(np.float32) for size in sizes)
    return *inputs, ids.astype(np.int32)


@pytest.mark.parametrize("length", [1, 8, 37, 64])
def test_blocks_equal_all_scores_at_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "BLOCK", 8)
    inputs = _random_rows(length, 4, length)
    result = _value_and_gradients(attention, *inputs)
    expected = _value_and_gradients(attention_reference, *inputs)
    chex.assert_trees_all_close(result, expected, atol=1e-5, rtol=1e-5)


def test_rows_on_a_mesh_equal_rows_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "BLOCK", 8)
    inputs = _random_rows(5, 8, 21)
    expected = _value_and_gradients(attention_reference, *inputs)
    with jax.set_mesh(make_mesh(data=2, expert=4)):
        result = _value_and_gradients(attention, *inputs)
    chex.assert_trees_all_close(result, expected, atol=1e-5, rtol=1e-5)


def test_only_pairs_of_blocks_that_share_a_document_are_computed() -> None:
    # Blocks of 4: documents of 4, 4 and 8, then one of 16; causality leaves 5 and 10 of 16 pairs.
    ids = np.array([[1] * 4 + [2] * 4 + [3] * 8, [1] * 16], np.int32)

    def counts(row):
        """By query block, and by key block."""
        numbers, first, last = attention_module._ranges(jnp.asarray(row).reshape(4, 1, 4), 4)
        return jnp.sum(numbers - first + 1).item(), jnp.sum(last - numbers + 1).item()

    assert [counts(row) for row in ids] == [(5, 5), (10, 10)]


def test_no_array_grows_with_the_square_of_the_length() -> None:
    rows, length = 1, 2048
    split = jax.NamedSharding(jax.sharding.get_mesh(), BATCH)
    shapes = [(rows, length, 2, dim) for dim in (QK, QK, V)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split) for shape in shapes]
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=split)

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, ids, SCALE))

    compiled = quick_jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs, ids).compile()
    assert f"{length},{length}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length * 2


def test_several_short_rows_in_bfloat16_as_compiled_for_training() -> None:
    """Not quick_jit: what XLA makes of products of bfloat16 depends on its optimizations."""
    rng = np.random.default_rng(0)
    rows, length = 4, 128
    q, k, v = (rng.normal(size=(rows, length, 4, dim)).astype(jnp.bfloat16) for dim in (48, 48, 32))
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    direction = rng.normal(size=v.shape).astype(np.float32)

    def run(function, q, k, v, segments, direction):
        def loss(q, k, v):
            return jnp.sum(function(q, k, v, segments, 0.1).astype(jnp.float32) * direction)

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    placed = _place(q, k, v, segments, direction)
    found = jax.jit(run, static_argnums=0)(attention, *placed)
    wide = (*(x.astype(jnp.float32) for x in placed[:3]), *placed[3:])
    expected = jax.jit(run, static_argnums=0)(attention_reference, *wide)
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(gradient, np.float32) - wanted) / np.linalg.norm(wanted)
        assert error < 1e-2
