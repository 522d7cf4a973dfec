"""configs/tiny.py with fields changed, as tests of the checks want it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from moe_jax import validation
from moe_jax.config import UserError

CONFIGS = Path(validation.__file__).parents[1] / "configs"
# What sentences below say of configs/tiny.py, so that it can be tuned.
TINY = {
    "model.num_hidden_layers": 4,
    "model.max_position_embeddings": 512,
    "model.moe.num_experts": 16,
    "model.moe.num_experts_per_tok": 4,
    "model.moe.num_expert_groups": 4,
    "model.moe.num_limited_groups": 2,
    "optimizer.peak_lr": 4e-3,
    "optimizer.final_lr": 2e-4,
    "optimizer.warmup_steps": 20,
    "data.num_streams": 8,
    "data.stages": (
        {"sequence_length": 128, "until_tokens": 60 * 4096},
        {"sequence_length": 256, "until_tokens": None},
    ),
    "training.num_steps": 240,
    "training.tokens_per_step": 4096,
    "training.micro_batches": 1,
    "training.sample_prompt": "def ",
}


def load(file: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def raw(fields: dict[str, Any]) -> dict[str, Any]:
    """What configs/tiny.py gives, changed: {"model.vocab_size": 0}."""
    raw = load(CONFIGS / "tiny.py").to_dict()
    for name, value in (TINY | fields).items():
        group = raw
        *path, last = name.split(".")
        for part in path:
            group = group[part]
        group[last] = value
    return raw


def refusal(fields: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        validation.parse(raw(fields))
    return str(error.value)


def sources(*sources: tuple[str, float]) -> tuple[dict[str, Any], ...]:
    return tuple({"path": path, "weight": weight} for path, weight in sources)


def stages(*stages: tuple[int, int | None]) -> tuple[dict[str, Any], ...]:
    return tuple({"sequence_length": length, "until_tokens": tokens} for length, tokens in stages)
