"""What the devices of a mesh must divide, and the forms that a platform lacks."""

import re
from typing import Any

import pytest
from raw_configs import raw

from moe_jax import sharding, validation
from moe_jax.config import MESH_AXES, MeshConfig, UserError


def _sizes(**axes: int) -> dict[str, int]:
    return dict.fromkeys(MESH_AXES, 1) | axes


def test_experts_divide_over_the_mesh() -> None:
    config = validation.parse(raw({}))
    validation.check_mesh(config, _sizes(fsdp=2, expert=4))
    validation.check_mesh(config, _sizes(expert_outer=4, expert=4))
    with pytest.raises(UserError) as error:
        validation.check_mesh(config, _sizes(expert_outer=2, expert=3))
    assert str(error.value) == (
        "config.model.moe.num_experts=16 must be a multiple of the 6 devices of "
        "config.mesh.expert_outer=2 times config.mesh.expert=3"
    )


@pytest.mark.parametrize(
    ("fields", "axes", "rows", "stage", "length", "micro", "devices"),
    [
        ({}, {"data": 32}, 16, 1, 256, 1, 32),
        ({}, {"data": 3}, 32, 0, 128, 1, 3),
        ({"training.micro_batches": 4}, {"data": 2, "fsdp": 2, "expert": 2}, 4, 1, 256, 4, 8),
        ({"training.micro_batches": 16}, {"expert_outer": 2}, 1, 1, 256, 16, 2),
    ],
)
def test_rows_of_a_micro_batch_divide_over_the_mesh(
    fields: dict[str, Any],
    axes: dict[str, int],
    rows: int,
    stage: int,
    length: int,
    micro: int,
    devices: int,
) -> None:
    with pytest.raises(UserError) as error:
        validation.check_mesh(validation.parse(raw(fields)), _sizes(**axes))
    assert str(error.value) == (
        f"the {rows} rows of a micro-batch in config.data.stages[{stage}] "
        f"(4096 tokens a step / sequence_length={length} / "
        f"{micro} micro-batches) must be a multiple of the {devices} devices that "
        "the batch is split over (data * fsdp * expert_outer * expert)"
    )


def test_devices_that_the_mesh_does_not_divide() -> None:
    mesh = MeshConfig(num_cpu_devices=8, fsdp=-1, expert=3)
    with pytest.raises(UserError, match=re.escape("(fsdp=-1 * expert=3) does not fit 8 devices")):
        sharding.mesh_sizes(mesh, mesh.num_cpu_devices)


@pytest.mark.parametrize(
    ("operation", "form", "platform", "others"),
    [
        ("exchange", "ragged", "cpu", "auto or padded"),
        ("attention", "gpu", "tpu", "auto or tpu or portable"),
        ("grouped_matmul", "tpu", "gpu", "auto or gpu or portable"),
    ],
)
def test_forms_that_the_platform_lacks(
    operation: str, form: str, platform: str, others: str
) -> None:
    field = f"model.backends.{operation}"
    config = validation.parse(raw({field: form}))
    with pytest.raises(UserError) as error:
        validation.check_mesh(config, _sizes(), platform)
    assert str(error.value) == (
        f"config.{field}={form!r} does not run on {platform}; set it to {others}"
    )
    validation.check_mesh(validation.parse(raw({field: "auto"})), _sizes(), platform)


def test_parts_of_an_exchange() -> None:
    config = validation.parse(raw({"model.moe.exchange_parts": 3}))
    with pytest.raises(UserError) as error:
        validation.check_mesh(config, _sizes(data=8))
    assert str(error.value) == (
        "config.model.moe.exchange_parts=3 must divide the 512 tokens that each device has of a "
        "micro-batch in config.data.stages[0]"
    )
