"""Forms of operations by the platform that is compiled for."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from emulated import make_mesh

from moe_jax.config import AttentionConfig, BackendConfig, ModelConfig, MoEConfig, UserError
from moe_jax.ops.backends import Backends, choose

CONFIG = ModelConfig(hidden_size=128, moe=MoEConfig(intermediate_size=64))
BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
PORTABLE = Backends("portable", "portable", "padded")


def _choose(platform: str, kind: str, config: ModelConfig = CONFIG, dtype=BF16) -> Backends:
    device = jax.sharding.AbstractDevice(kind, None, platform)
    mesh = make_mesh().abstract_mesh.update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return choose(config, dtype)


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("cpu", "cpu", PORTABLE),
        ("tpu", "TPU v5", Backends("tpu", "tpu", "ragged")),
        ("gpu", "NVIDIA H100 80GB HBM3", Backends("gpu", "gpu", "padded")),
        ("tpu", "TPU v4", Backends("tpu", "portable", "ragged")),
        # The kernels of grouped products are for Hopper.
        ("gpu", "NVIDIA A100-SXM4-40GB", Backends("gpu", "portable", "padded")),
        ("gpu", "NVIDIA L4", PORTABLE),
    ],
)
def test_auto_follows_the_mesh(platform: str, kind: str, expected: Backends) -> None:
    assert _choose(platform, kind) == expected


def test_what_the_kernels_cannot_take_goes_the_portable_way() -> None:
    hopper = "gpu", "NVIDIA H200"
    assert _choose(*hopper, dtype=F32).grouped_matmul == "portable"
    narrow = dataclasses.replace(CONFIG, hidden_size=96)
    assert _choose(*hopper, narrow).grouped_matmul == "portable"


def test_what_is_wanted_is_taken() -> None:
    wanted = BackendConfig(attention="portable", grouped_matmul="gpu", exchange="padded")
    config = dataclasses.replace(CONFIG, backends=wanted)
    assert _choose("tpu", "TPU v5", config) == Backends("portable", "gpu", "padded")


def test_without_a_mesh_everything_is_portable() -> None:
    assert choose(CONFIG, BF16) == PORTABLE


@pytest.mark.parametrize(
    ("backends", "dtype", "kind", "sentence"),
    [
        (
            BackendConfig(grouped_matmul="gpu"),
            F32,
            "NVIDIA H100 80GB HBM3",
            "grouped_matmul='gpu' take bfloat16, not float32; 'portable' takes anything",
        ),
        (
            BackendConfig(attention="gpu"),
            BF16,
            "NVIDIA L4",
            "attention='gpu' need more shared memory than a NVIDIA L4 has; 'portable' takes",
        ),
    ],
)
def test_kernels_that_cannot_take_the_model_are_refused(
    backends: BackendConfig, dtype: jnp.dtype, kind: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        _choose("gpu", kind, dataclasses.replace(CONFIG, backends=backends), dtype)


def test_heads_too_large_for_the_memory_go_the_portable_way() -> None:
    attention = AttentionConfig(kind="grouped_query", head_dim=256)
    config = dataclasses.replace(CONFIG, attention=attention)
    assert _choose("gpu", "NVIDIA H200", config).attention == "gpu"
    assert _choose("gpu", "NVIDIA H200", config, F32).attention == "portable"
