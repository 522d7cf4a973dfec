"""Lines for a person."""

import jax
import pytest

from moe_jax import sharding
from moe_jax.config import Config, MeshConfig, PrecisionConfig, Stage
from moe_jax.training import summary


@pytest.mark.parametrize(
    ("platform", "recipe", "form", "expected"),
    [
        ("cpu", "none", "auto", None),
        ("cpu", "fp8_block", "auto", "products in eight bits have no kernels for cpu"),
        (
            "gpu",
            "mxfp8",
            "auto",
            "products in eight bits have kernels for recipe='fp8_block' alone",
        ),
        ("gpu", "fp8_block", "portable", "config.precision.fp8_form is 'portable'"),
        ("gpu", "fp8_block", "auto", ""),
    ],
)
def test_a_recipe_that_is_portable_says_why_and_what_it_costs(
    platform: str, recipe: str, form: str, expected: str | None
) -> None:
    precision = PrecisionConfig(recipe=recipe, fp8_form=form)
    sizes = sharding.mesh_sizes(MeshConfig(), 1)
    device = jax.sharding.AbstractDevice(
        {"cpu": "cpu", "gpu": "NVIDIA H100 80GB HBM3"}[platform], None, platform
    )
    mesh = sharding.abstract_mesh(sizes, platform).update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lines = summary.recipe(Config(precision=precision))
    if expected is None:
        assert lines == []
    elif expected:
        assert lines[0] == f"recipe      {recipe}, portable: {expected}"
        assert "slower than" in lines[1]
    else:
        assert lines == [
            "recipe      fp8_block, by the devices' own products in eight bits where dims allow"
        ]


def test_products_that_fell_back_are_counted_and_the_worst_is_named() -> None:
    metrics = {
        "fp8_exact": 3,
        "fp8/moe_blocks_0/weight_error": 0.021,
        "fp8/moe_blocks_1/gradient_error": 0.0834,
        "fp8/moe_blocks_1/gradient_flushed": 0.9,
    }
    assert summary.fell_back(metrics, 0.05) == (
        "3 products are no longer in eight bits: an operand erred by more than "
        "fp8_error_bound=0.05; now the worst is moe_blocks_1/gradient with 0.0834"
    )


def test_a_stage_says_what_it_has_of_its_own() -> None:
    plain = summary.stage(1, 32, Stage(128), 23.0, 2**25)
    assert plain == "stage 1     32 rows of 128 tokens, compiled in 23s, 32.0 MiB per device"
    stage = Stage(
        128, weights=(0.25, 0.75), mask_documents=False, rope_factor=40.0, learning_rate_factor=0.1
    )
    assert summary.stage(1, 32, stage, 23.0, 2**25) == (
        f"{plain}; sources 25.0%, 75.0%; documents see each other; YaRN's factor 40; "
        "learning rate times 0.1"
    )
