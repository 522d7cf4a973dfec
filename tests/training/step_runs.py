"""A tiny run for tests of the step: its config, batch and state, and the step on any mesh."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from emulated import make_mesh, quick_jit

from moe_jax import sharding
from moe_jax.config import (
    AttentionConfig,
    Config,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainingConfig,
)
from moe_jax.schedules import scheduled
from moe_jax.training.step import init_state, make_train_step

ROWS, LENGTH, VOCAB, EXPERTS, TOP_K, LAYERS = 8, 16, 32, 8, 2, 2
CONFIG = Config(
    model=ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=0,
        max_position_embeddings=LENGTH,
        attention=AttentionConfig(
            num_heads=2,
            q_lora_rank=None,
            kv_lora_rank=8,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=4,
        ),
        moe=MoEConfig(
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            num_shared_experts=0,
            intermediate_size=8,
            bias_update_speed=0.25,
            sequence_loss_weight=0.1,
        ),
    ),
    precision=PrecisionConfig(compute_dtype="float32"),
    # A large eps: otherwise Adam's first update is the gradient's sign, rounding errors included.
    optimizer=OptimizerConfig(peak_lr=0.1, warmup_steps=4, eps=0.1, ema_decay=0.75),
    training=TrainingConfig(num_steps=20, micro_batches=1, rematerialization="none"),
)
FROZEN = ("parameters", "optimizer", "router_bias", "ema", "update")


def make_batch(micro_batches: int = 1) -> dict[str, np.ndarray]:
    """The same rows each time, row r in micro-batch r % micro_batches, as the loader cuts them.

    Rows hold two documents and padding of very different sizes; row 3 holds nothing.
    """
    rng = np.random.default_rng(0)
    valid = np.arange(LENGTH) < np.array([16, 3, 9, 0, 12, 1, 16, 5])[:, None]
    segments = np.where(np.arange(LENGTH) < 2, 1, 2) * valid
    rows = {
        "tokens": rng.integers(VOCAB, size=valid.shape) * valid,
        "targets": rng.integers(VOCAB, size=valid.shape) * valid,
        "segment_ids": segments,
        "positions": (np.arange(LENGTH) - 2 * (segments == 2)) * valid,
    }
    # Not always 1, so that a mean over tokens is not a mean over weights.
    weights = valid * rng.choice([0.0, 0.5, 1.0], size=valid.shape, p=[0.2, 0.2, 0.6])
    batch = {name: array.astype(np.int32) for name, array in rows.items()}
    batch["loss_weights"] = weights.astype(np.float32)
    return {
        name: array.reshape(-1, micro_batches, LENGTH).swapaxes(0, 1)
        for name, array in batch.items()
    }


@functools.cache
def mesh_of(axes: tuple[tuple[str, int], ...]) -> jax.sharding.Mesh:
    return make_mesh(**dict(axes))


@functools.cache
def shapes_of(config: Config = CONFIG) -> Any:
    with jax.set_mesh(mesh_of(())):
        return jax.eval_shape(lambda: init_state(config))


def make_state(config: Config = CONFIG) -> Any:
    """As after some updates: every array holds something, the norms near 1, `nu` above 0."""
    rng = np.random.default_rng(1)

    def value(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [key.key for key in path]
        if names[0] in ("step", "update"):
            return np.array({"step": 7, "update": 5}[names[0]], np.int32)
        array = 0.3 * rng.standard_normal(shape.shape, np.float32)
        if "nu" in names:
            array = 0.1 * array**2
        if "scale" in names and names[0] == "parameters":
            array += 1.0
        return array.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes_of(config))


@functools.cache
def layout_of(axes: tuple[tuple[str, int], ...], config: Config = CONFIG) -> Any:
    """The sharding of each array of the state."""
    with jax.set_mesh(mesh_of(axes)):
        return jax.tree.map(
            # Scalars have no sharding here.
            lambda x: jax.NamedSharding(mesh_of(axes), x.sharding.spec if x.sharding else jax.P()),
            jax.eval_shape(lambda: init_state(config)),
        )


@functools.cache
def compiled_step(
    axes: tuple[tuple[str, int], ...],
    micro_batches: int,
    rematerialization: str,
    config: Config = CONFIG,
) -> Any:
    training = dataclasses.replace(
        config.training, micro_batches=micro_batches, rematerialization=rematerialization
    )
    with jax.set_mesh(mesh_of(axes)):
        return quick_jit(make_train_step(dataclasses.replace(config, training=training)))


def run(
    state: Any,
    batch: dict[str, np.ndarray],
    rematerialization: str = "none",
    config: Config = CONFIG,
    **axes: int,
) -> tuple[Any, dict[str, Any]]:
    """The state after the step and the metrics, both on the host."""
    new, metrics = run_on_devices(state, batch, rematerialization, config, **axes)[1:]
    return jax.device_get(new), {
        name: x.item() if x.ndim == 0 else x for name, x in metrics.items()
    }


def run_on_devices(
    state: Any,
    batch: dict[str, np.ndarray],
    rematerialization: str = "none",
    config: Config = CONFIG,
    **axes: int,
) -> tuple[Any, Any, Any]:
    key = tuple(sorted(axes.items()))
    step = compiled_step(key, len(batch["tokens"]), rematerialization, config)
    with jax.set_mesh(mesh_of(key)):
        before = jax.device_put(state, layout_of(key, config))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh_of(key)))
        return before, *step(before, batch, scheduled(config, 7))


@functools.cache
def reference() -> tuple[Any, dict[str, Any]]:
    """One device, one micro-batch."""
    return run(make_state(), make_batch())


def assert_close(actual: Any, expected: Any, atol: float = 1e-6) -> None:
    """Equal but for the order of float32 sums; `atol` is of an array's largest entry."""

    def close(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        name = jax.tree_util.keystr(path)
        scale = float(np.max(np.abs(b), initial=1e-6))
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol * scale, err_msg=name)

    jax.tree_util.tree_map_with_path(close, actual, expected)
