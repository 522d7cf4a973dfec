"""Models whose hot experts stand in several slots: the same in all but where tokens go."""

from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig, UserError
from moe_jax.inference.generation import Generator
from moe_jax.inference.redundancy import check_redundancy, measure_load, with_redundant_experts
from moe_jax.interop import huggingface
from moe_jax.ops.placement import place
from moe_jax.sharding import EXPERT_AXES, P

PROMPTS = [np.array(prompt) for prompt in ([1, 2, 3], [5] * 9, [7, 1, 1, 4, 4, 2], [11], [20, 3])]
NEW, SLOTS = 12, 24
MESHES = [{"expert": 4}, {"fsdp": 2, "expert_outer": 2, "expert": 2}]
LAYERS, EXPERTS, TOP_K = 2, 4, 2  # of the model of latent attention


@pytest.mark.parametrize(("sizes", "speculative"), [(MESHES[0], False), (MESHES[1], True)], ids=str)
def test_the_text_is_the_same(make_model, sizes: dict[str, int], speculative: bool) -> None:
    model = make_model(**sizes)
    redundant, _ = with_redundant_experts(model, measure_load(model, PROMPTS), 4)
    texts = Generator(redundant, slots=SLOTS, speculative=speculative)(PROMPTS, NEW)
    assert texts == Generator(make_model(), slots=SLOTS)(PROMPTS, NEW)


def test_load_is_of_experts_whatever_stands_where(make_model) -> None:
    model = make_model(**MESHES[0])
    load_LE = measure_load(make_model(), PROMPTS)
    assert load_LE.shape == (LAYERS, EXPERTS) and len(set(load_LE[0])) > 1
    tokens = sum(map(len, PROMPTS))
    chex.assert_trees_all_equal(load_LE.sum(axis=1), np.full(LAYERS, TOP_K * tokens))
    chex.assert_trees_all_equal(measure_load(model, PROMPTS), load_LE)
    redundant, _ = with_redundant_experts(model, load_LE, 4)
    chex.assert_trees_all_equal(measure_load(redundant, PROMPTS), load_LE)


def test_what_is_copied_and_what_is_shared(make_model) -> None:
    model = make_model(**MESHES[1])
    load_LE = np.array([[9, 0, 2, 1], [1, 1, 1, 5]])
    redundant, line = with_redundant_experts(model, load_LE, 4)
    table_LS = place(load_LE, 4, 2).expert_of_slot_LS
    before, after = (m.parameters["moe_blocks"]["moe"] for m in (model, redundant))
    for name in ("gate", "up", "down"):
        expected = np.take_along_axis(np.asarray(before[name]), table_LS[:, :, None, None], axis=1)
        chex.assert_trees_all_equal(np.asarray(after[name]), expected)
        assert after[name].sharding == before[name].sharding
    for name in ("router", "shared"):
        assert after[name] is before[name]
    assert redundant.router_bias is model.router_bias
    # 9 and 5 of means 3 and 2; then 9 / 4 + 1 and 5 / 4 + 1.
    assert line == (
        "experts     4, and 4 redundant: fullest device 1.10x the mean by the prompts' load, "
        "2.80x without"
    )


def test_each_replica_serves_a_part(make_model) -> None:
    """Replicas of no number in the last layer show where tokens went."""
    model = make_model(**MESHES[0])
    load_LE = measure_load(model, PROMPTS)
    redundant, _ = with_redundant_experts(model, load_LE, 4)
    row = place(load_LE, 4, 2).expert_of_slot_LS[-1]
    slots = np.flatnonzero(row == np.argmax(load_LE[-1]))
    assert len(slots) > 1
    tokens = np.stack([np.pad(prompt, (0, 9 - len(prompt))) for prompt in PROMPTS])
    inputs = [model.place(x) for x in (tokens, np.mgrid[:5, :9][1], np.ones_like(tokens))]
    by_slots = jax.NamedSharding(model.mesh, P(None, EXPERT_AXES))
    run = jax.jit(redundant.apply)

    def hit(*broken: int) -> np.ndarray:
        factors = np.ones((LAYERS, 8, 1, 1), np.float32)
        factors[-1, list(broken)] = np.nan
        blocks = dict(redundant.parameters["moe_blocks"])
        down = blocks["moe"]["down"] * jax.device_put(factors, by_slots)
        blocks["moe"] = blocks["moe"] | {"down": down}
        parameters = redundant.parameters | {"moe_blocks": blocks}
        return np.isnan(np.asarray(run(parameters, redundant.router_bias, *inputs))).any(axis=2)

    with jax.set_mesh(model.mesh):
        parts = [hit(slot) for slot in slots]
        assert all(part.any() for part in parts)
        chex.assert_trees_all_equal(sum(part.astype(int) for part in parts), hit(*slots) * 1)


@pytest.mark.parametrize(
    ("redundant", "devices", "sentence"),
    [
        (-1, 4, "--redundant_experts=-1 must be at least 0"),
        (
            4,
            1,
            "--redundant_experts=4 exceeds 0, with all 16 experts on every device that --mesh "
            "splits them over (1)",
        ),
        (
            49,
            4,
            "--redundant_experts=49 exceeds 48, with all 16 experts on every device that --mesh "
            "splits them over (4)",
        ),
        (
            5,
            4,
            "--redundant_experts=5 and the model's 16 experts are 21, which do not divide over the "
            "4 devices that --mesh splits experts over; try --redundant_experts=8",
        ),
    ],
)
def test_numbers_that_cannot_be(redundant: int, devices: int, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        check_redundancy(redundant, ModelConfig(moe=MoEConfig(num_experts=16)), devices)
    assert str(error.value) == sentence


def test_models_without_experts_have_none_to_repeat() -> None:
    dense = ModelConfig(num_hidden_layers=2, first_k_dense_replace=2)
    check_redundancy(0, dense, 3)
    with pytest.raises(UserError, match="=4 needs a model with routed experts, and this one has"):
        check_redundancy(4, dense, 4)


def test_replicas_are_not_saved(make_model, tmp_path: Path) -> None:
    redundant, _ = with_redundant_experts(make_model(**MESHES[0]), np.ones((LAYERS, EXPERTS)), 4)
    with pytest.raises(UserError, match="cannot be saved; save the one without"):
        huggingface.save(redundant, tmp_path / "saved")
