"""The whole train step of DeepSeek-V3, traced for thousands of devices without any of them."""

from typing import Any

import jax
import pytest
from raw_configs import CONFIGS, load

from moe_jax import sharding, validation
from moe_jax.schedules import scheduled
from moe_jax.training.step import abstract_batch, init_state, make_train_step


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2048, 8192])
def test_the_step_of_deepseek_v3_is_traced_without_allocating(devices: int) -> None:
    raw: Any = load(CONFIGS / "deepseek_v3.py")
    raw.data.stages, raw.training.num_steps = ({"sequence_length": 4096},), 1000
    raw.training.tokens_per_step *= devices // 2048
    config = validation.parse(raw)
    sizes = sharding.mesh_sizes(config.mesh, devices)
    validation.check_mesh(config, sizes, "tpu")
    mesh: Any = sharding.abstract_mesh(sizes, "tpu")
    before = len(jax.live_arrays())
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(config))
        batch = abstract_batch(config, config.data.stages[0], mesh)
        new, metrics = jax.eval_shape(make_train_step(config), state, batch, scheduled(config, 0))
    assert jax.tree.map(lambda x: x.shape, new) == jax.tree.map(lambda x: x.shape, state)
    gate = new["parameters"]["moe_blocks"]["moe"]["gate"]
    assert mesh.size == devices and gate.sharding.spec[1]  # experts are split
    assert len(jax.live_arrays()) == before
