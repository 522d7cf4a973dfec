"""The loss, against float64, and without whole logits, against the loss of whole ones."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, quick_jit

from moe_jax.ops import cross_entropy as module
from moe_jax.ops.cross_entropy import cross_entropy, projected_cross_entropy
from moe_jax.sharding import BATCH, P

VOCAB = 11


def _inputs(scale: float = 2.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(3, 4, VOCAB))).astype(np.float32)
    targets = rng.integers(0, VOCAB, (3, 4)).astype(np.int32)
    weights = rng.uniform(0.5, 2, (3, 4)).astype(np.float32)
    weights[0, 1] = weights[2] = 0
    return logits, targets, weights


def _softmax(row: np.ndarray) -> np.ndarray:
    exponentials = np.exp(row.astype(np.float64) - row.max())
    return exponentials / exponentials.sum()


def test_value() -> None:
    logits, targets, weights = _inputs()
    expected = -sum(weights[i] * np.log(_softmax(logits[i])[targets[i]]) for i in np.ndindex(3, 4))
    result = cross_entropy(logits, targets, weights)
    chex.assert_shape(result, ())
    chex.assert_trees_all_close(result, expected, rtol=1e-6)


def test_gradient_is_weighted_softmax_less_one_hot() -> None:
    logits, targets, weights = _inputs()
    expected = np.zeros(logits.shape)
    for i in np.ndindex(3, 4):
        expected[i] = weights[i] * (_softmax(logits[i]) - np.eye(VOCAB)[targets[i]])
    gradient = jax.grad(cross_entropy)(logits, targets, weights)
    chex.assert_trees_all_close(gradient, expected, atol=1e-6)


def test_weight_zero_hides_the_target_and_the_logits() -> None:
    logits, targets, weights = _inputs()
    changed, others = logits.copy(), targets.copy()
    changed[2], others[2] = 7 * logits[2] - 3, VOCAB - 1 - targets[2]
    chex.assert_trees_all_equal(
        cross_entropy(changed, others, weights), cross_entropy(logits, targets, weights)
    )
    chex.assert_trees_all_equal(
        jax.grad(cross_entropy)(changed, others, weights)[2], np.zeros((4, VOCAB))
    )


def test_large_logits() -> None:
    """Neither overflow nor a shift of all logits changes the loss."""
    logits, targets, weights = _inputs()
    logits = np.round(logits * 64) / 64  # exact when shifted
    expected = cross_entropy(logits, targets, weights)
    for shift in (1e4, -1e4):
        shifted = cross_entropy(logits + np.float32(shift), targets, weights)
        chex.assert_trees_all_close(shifted, expected, rtol=1e-3)
    certain = jnp.where(jnp.arange(VOCAB) == 3, 3e38, 0.0)
    loss, gradient = jax.value_and_grad(cross_entropy)(certain, jnp.int32(3), jnp.float32(1))
    chex.assert_trees_all_equal((loss, gradient), (jnp.float32(0), jnp.zeros(VOCAB)))


DIM = 6


def _projected_inputs(dtype: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(8, 5, DIM)).astype(jnp.dtype(dtype))
    weight = rng.normal(size=(DIM, 16)).astype(np.float32)
    targets = rng.integers(0, 16, (8, 5)).astype(np.int32)
    weights = rng.uniform(0.5, 2, (8, 5)).astype(np.float32)
    weights[2, 1] = weights[7] = 0
    return x, weight, targets, weights


def _of_whole_logits(x, weight, targets, weights, dtype):
    logits = jnp.dot(x.astype(dtype), weight.astype(dtype), preferred_element_type=jnp.float32)
    return 3 * cross_entropy(logits, targets, weights)


@pytest.mark.parametrize("chunk_logits", [1, 16 * 3, 16 * 7, 2**26])
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (P(), "float32"),
        (P("fsdp"), "float32"),
        (P("fsdp", "expert"), "float32"),
        (P(None, ("data", "fsdp")), "float32"),
        (P("fsdp"), "bfloat16"),
        (P("fsdp", "tensor"), "float32"),
        (P(None, ("context", "tensor")), "bfloat16"),
    ],
)
def test_projected_equals_that_of_whole_logits(
    chunk_logits: int, spec: P, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 1, 3, 7 tokens and of all: those of a device divide by none of them."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    x, weight, targets, weights = _projected_inputs(dtype)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)

    def ours(x, weight, targets, weights):
        return 3 * projected_cross_entropy(x, weight, targets, weights, jnp.dtype(dtype))

    specs = BATCH, spec, BATCH, BATCH
    with jax.set_mesh(mesh):
        placed = jax.device_put(
            (x, weight, targets, weights), tuple(jax.NamedSharding(mesh, s) for s in specs)
        )
        loss, (dx, dweight) = quick_jit(jax.value_and_grad(ours, argnums=(0, 1)))(*placed)
        assert quick_jit(ours)(*placed) == loss
    assert dx.dtype == x.dtype and dweight.dtype == jnp.float32
    assert dweight.sharding.is_equivalent_to(placed[1].sharding, 2)
    expected, (dx_expected, dweight_expected) = jax.value_and_grad(
        _of_whole_logits, argnums=(0, 1)
    )(x, weight, targets, weights, jnp.dtype(dtype))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    chex.assert_trees_all_close(loss, expected, rtol=1e-5)
    for gradient, wanted in ((dx, dx_expected), (dweight, dweight_expected)):
        wanted = np.asarray(wanted, np.float32)
        error = np.abs(np.asarray(gradient, np.float32) - wanted).max() / np.abs(wanted).max()
        assert error < tolerance


def test_a_split_vocabulary_stays_split() -> None:
    """No device gets the weight's other part, nor its logits."""
    mesh = make_mesh(fsdp=2, tensor=2)
    inputs = _projected_inputs("float32")
    with jax.set_mesh(mesh):
        specs = BATCH, P(None, "tensor"), BATCH, BATCH
        placed = [
            jax.device_put(x, jax.NamedSharding(mesh, s))
            for x, s in zip(inputs, specs, strict=True)
        ]
        gradients = jax.grad(projected_cross_entropy, argnums=(0, 1))
        text = jax.jit(gradients, static_argnums=4).lower(*placed, jnp.dtype("float32"))
        text = text.compile().as_text()
    assert f"[20,{16 // 2}]" in text and "[20,16]" not in text
    assert "all-gather" not in text


def test_whole_logits_never_stand_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", 64 * 1024)
    tokens, dim, vocab = 2048, 8, 1024
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
            for shape, dtype, spec in (
                ((1, tokens, dim), jnp.float32, BATCH),
                ((dim, vocab), jnp.float32, P()),
                ((1, tokens), jnp.int32, BATCH),
                ((1, tokens), jnp.float32, BATCH),
            )
        ]
        gradients = jax.grad(projected_cross_entropy, argnums=(0, 1))
        compiled = jax.jit(gradients, static_argnums=4).lower(*shapes, jnp.dtype("float32"))
        memory = compiled.compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * vocab * 4 / 4
