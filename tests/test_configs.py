"""Every config in configs/: it parses, has the published size, and its tiny sibling trains."""

import functools
import runpy
from pathlib import Path

import jax
import pytest
from emulated import make_mesh

from moe_jax import sharding, validation
from moe_jax.config import Config, UserError, default_config
from moe_jax.curriculum import num_rows, stage_starts, tokens_after
from moe_jax.models.language_model import abstract_weights
from moe_jax.planning.operations import Parameters, count_parameters
from moe_jax.schedules import scheduled
from moe_jax.sizes import sized
from moe_jax.training.step import abstract_batch, init_state, make_train_step

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.py"))
FAMILIES = [file.stem for file in CONFIGS if file.stem != "tiny"]
# The main model, and of that per token; from DeepSeek's, Mistral's and Meta's published weights.
# What is not published is None.
PUBLISHED = {
    "deepseek_v3": (671_026_419_200, 37_552_282_624),
    "deepseek_r1": (671_026_419_200, 37_552_282_624),
    "deepseek_v2": (235_741_434_880, None),
    "deepseek_v2_lite": (15_706_484_224, None),
    "mixtral_8x7b": (46_702_792_704, None),
    "switch_base": (None, None),
    "llama3_8b": (8_030_261_248, 8_030_261_248),
    "llama3_405b": (405_853_388_800, 405_853_388_800),
}


@functools.cache
def _config(name: str, size: str = "full") -> Config:
    file = Path(__file__).parents[1] / "configs" / f"{name}.py"
    get_config = runpy.run_path(str(file))["get_config"]
    return validation.parse(get_config() if size == "full" else get_config(size))


def _count(config: Config) -> Parameters:
    return count_parameters(*abstract_weights(config.model, make_mesh()), config.model)


def test_the_list_is_complete() -> None:
    assert set(PUBLISHED) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_sizes(name: str) -> None:
    counted = _count(_config(name))
    for value, published in zip(counted[:2], PUBLISHED[name], strict=True):
        assert published in (value, None)


def test_active_parameters_by_hand() -> None:
    """Two of Mixtral's eight experts; one of Switch's 128."""
    for name, layers, unchosen, one_expert in (
        ("mixtral_8x7b", 32, 6, 3 * 4096 * 14336),
        ("switch_base", 12, 127, 3 * 768 * 2048),
    ):
        counted = _count(_config(name))
        assert counted.total - counted.active == layers * unchosen * one_expert


def test_what_predicts_ahead_by_hand() -> None:
    """A routed layer, a projection of two states to one, three norms: 11.6 B."""
    attention = 7168 * 1536 + 1536 + 1536 * 128 * 192
    attention += 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
    routed = 257 * 3 * 7168 * 2048 + 7168 * 256 + 256
    block = attention + routed + 2 * 7168
    assert _count(_config("deepseek_v3")).mtp == block + 2 * 7168 * 7168 + 3 * 7168


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_siblings_train(name: str) -> None:
    """Traced on eight devices: shapes and shardings fit; nothing is compiled."""
    config = _config(name, "tiny")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:8])
    validation.check_mesh(config, dict(mesh.shape))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(jax.jit(lambda: init_state(config)))
        batch = abstract_batch(config, config.data.stages[0], mesh)
        step = make_train_step(config)
        new, metrics = jax.eval_shape(step, state, batch, scheduled(config, 0))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert {"loss", "grad_norm"} <= set(metrics)


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_siblings_keep_the_family(name: str) -> None:
    full, tiny = _config(name).model, _config(name, "tiny").model
    assert tiny.attention.kind == full.attention.kind
    assert (tiny.attention.q_lora_rank is None) == (full.attention.q_lora_rank is None)
    assert (tiny.rope.theta, tiny.rope.scaling) == (full.rope.theta, full.rope.scaling)
    assert tiny.num_nextn_predict_layers == full.num_nextn_predict_layers
    for field in ("scoring_func", "topk_method", "token_dropping", "norm_topk_prob"):
        assert getattr(tiny.moe, field) == getattr(full.moe, field)
    assert (tiny.first_k_dense_replace == tiny.num_hidden_layers) == (
        full.first_k_dense_replace == full.num_hidden_layers
    )
    assert _count(_config(name, "tiny")).total < 5_000_000


def test_another_size_is_refused() -> None:
    with pytest.raises(UserError) as error:
        sized(default_config(), "medium")
    assert str(error.value) == "the config knows no size 'medium'; full and tiny are there"


BILLION = 10**9


def _of_tokens(config: Config, tokens: int) -> dict[str, float]:
    """What the step takes that ends at or just after so many tokens."""
    low, high = 0, config.training.num_steps
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if tokens_after(config, middle) < tokens else (low, middle)
    return {name: float(value) for name, value in scheduled(config, low - 1).items()}


def test_the_recipe_of_v3() -> None:
    """Sections 4.2 and 4.3 of its report, at its borders."""
    config = _config("deepseek_v3", "long_context")
    end = 14_800 * BILLION
    for billions, rate, speed, ahead in (
        (12.6, 1.1e-4, 0.001, 0.3),  # half of the warm-up
        (9_999, 2.2e-4, 0.001, 0.3),
        (12_150, 1.21e-4, 0.001, 0.1),
        (14_299, 2.2e-5, 0.001, 0.1),
        (14_500, 2.2e-5, 0.0, 0.1),
        (14_799, 7.3e-6, 0.0, 0.1),
        (14_900, 7.3e-6, 0.0, 0.1),
    ):
        values = _of_tokens(config, round(billions * BILLION))
        assert values["learning_rate"] == pytest.approx(rate, rel=5e-3)
        assert values["bias_update_speed"] == pytest.approx(speed)
        assert values["mtp_loss_weight"] == pytest.approx(ahead)
    stages = config.data.stages
    assert [num_rows(config, stage) for stage in stages] == [
        *(4096, 8192, 12288, 16384, 16384, 2048, 512)
    ]
    assert stages[3].until_tokens == 469 * BILLION and stages[4].until_tokens == end
    assert [(s.sequence_length, s.rope_factor) for s in stages[-3:]] == [
        *((4096, None), (32768, 40.0), (131072, 40.0))
    ]
    starts = stage_starts(config)
    assert config.training.num_steps - starts[6] == starts[6] - starts[5] == 1000
    validation.check_mesh(config, sharding.mesh_sizes(config.mesh, 512), "tpu")
    with pytest.raises(
        UserError, match=r"the 512 rows of a micro-batch in config.data.stages\[5\]"
    ):
        validation.check_mesh(config, sharding.mesh_sizes(config.mesh, 1024), "tpu")
    # Without longer rows it runs where it ran.
    validation.check_mesh(_config("deepseek_v3"), sharding.mesh_sizes(config.mesh, 2048), "tpu")


def test_the_recipes_of_v2() -> None:
    for name, peak, borders in (
        ("deepseek_v2", 2.4e-4, (4859, 4861, 7289, 7291)),
        ("deepseek_v2_lite", 4.2e-4, (4559, 4561, 5129, 5131)),
    ):
        config = _config(name)
        rates = [_of_tokens(config, n * BILLION)["learning_rate"] for n in borders]
        expected = [peak, 0.316 * peak, 0.316 * peak, 0.316**2 * peak]
        assert rates == pytest.approx(expected, rel=1e-6)
    rows = [num_rows(_config("deepseek_v2"), s) for s in _config("deepseek_v2").data.stages]
    assert rows == [2304, 4608, 6912, 9216, 9216]


def test_a_recipe_at_a_laptops_size_keeps_its_course() -> None:
    config = _config("deepseek_v3", "tiny")
    # A few more steps than of batches that do not grow.
    assert 160 <= config.training.num_steps <= 165
    assert [num_rows(config, stage) for stage in config.data.stages] == [8, 16, 16]
    tokens = tokens_after(config, config.training.num_steps)
    values = [_of_tokens(config, round(share * tokens)) for share in (0.5, 0.96, 1.0)]
    rates = [each["learning_rate"] for each in values]
    assert rates == pytest.approx([4e-3, 4e-3 * 0.1, 4e-3 * 7.3 / 220], rel=0.2)
    assert [each["bias_update_speed"] for each in values] == pytest.approx([0.001, 0.001, 0.0])


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite"])
def test_a_scale_goes_through_a_whole_recipe_in_few_steps(name: str) -> None:
    file = Path(__file__).parents[1] / "configs" / f"{name}.py"
    raw = runpy.run_path(str(file))["get_config"]()
    raw.training.recipe_scale = 1e-6
    config = validation.parse(raw)
    assert len(config.data.stages) <= config.training.num_steps < 10
    raw.training.recipe_scale = 1e-4
    assert 20 < validation.parse(raw).training.num_steps < 50
