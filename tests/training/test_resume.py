"""Which changes a checkpoint's run may take, and the sentence for those that it may not."""

import json

import pytest

from moe_jax import validation
from moe_jax.config import Config, UserError, default_config
from moe_jax.training.resume import FORMAT, check, describe

FINGERPRINT = "0123456789abcdef" * 4
PLACE = "checkpoint 7 in runs/tiny/checkpoints"


def _config(**changes: object) -> Config:
    """The default with dotted fields changed: `training__num_steps=5`."""
    raw = default_config()
    for name, value in changes.items():
        raw.update_from_flattened_dict({name.replace("__", "."): value})
    return validation.parse(raw)


def _document() -> dict:
    document = describe(_config(), FINGERPRINT, {"step": 7, "streams": {"0": {"next": 3}}})
    return json.loads(json.dumps(document))  # as it comes from disk


def _refusal(config: Config, document: dict | None = None, fingerprint: str = FINGERPRINT) -> str:
    with pytest.raises(UserError) as error:
        check(document or _document(), config, fingerprint, PLACE)
    return str(error.value)


def test_the_document() -> None:
    document = _document()
    assert document["format"] == FORMAT
    assert document["corpus"] == FINGERPRINT
    assert document["data"] == {"step": 7, "streams": {"0": {"next": 3}}}
    assert document["config"]["model"]["moe"]["num_experts"] == 16


def test_the_same_config_goes_on_without_a_word() -> None:
    assert check(_document(), _config(), FINGERPRINT, PLACE) == []


@pytest.mark.parametrize(
    ("field", "before", "now"),
    [
        ("model.hidden_size", 128, 64),
        ("model.moe.num_experts", 16, 32),
        ("model.attention.q_lora_rank", 96, None),
        ("data.num_streams", 8, 4),
        ("data.mask_documents", True, False),
        ("data.holdout_every", 32, 16),
        ("data.text_field", "text", "body"),
        ("seed", 0, 1),
        ("training.tokens_per_step", 8192, 4096),
    ],
)
def test_what_must_stay(field: str, before: object, now: object) -> None:
    text = _refusal(_config(**{field.replace(".", "__"): now}))
    assert text == (
        f"{PLACE} was written under another configuration (config.{field}: {before!r} -> {now!r}); "
        "set these back or give another --workdir"
    )


def test_all_that_must_stay_is_named_at_once() -> None:
    text = _refusal(_config(seed=3, model__hidden_size=64, training__num_steps=500))
    assert "config.seed: 0 -> 3" in text and "config.model.hidden_size: 128 -> 64" in text
    assert "num_steps" not in text


def test_the_curriculum_must_stay() -> None:
    text = _refusal(_config(data__stages=({"sequence_length": 128, "until_tokens": None},)))
    assert "config.data.stages: " in text and "256" in text and "128" in text


def test_what_may_change_is_listed() -> None:
    config = _config(
        training__num_steps=500,
        training__micro_batches=4,
        training__stop_after_step=450,
        optimizer__peak_lr=0.004,
        mesh__fsdp=4,
        precision__compute_dtype="float32",
        checkpoint__keep=9,
        data__source="elsewhere/*.txt",
        data__prefetch=0,
        data__skip_invalid=True,
    )
    assert check(_document(), config, FINGERPRINT, PLACE) == [
        "config.checkpoint.keep: 2 -> 9",
        "config.data.prefetch: 2 -> 0",
        "config.data.skip_invalid: False -> True",
        "config.data.source: 'stdlib' -> 'elsewhere/*.txt'",
        "config.mesh.fsdp: -1 -> 4",
        "config.optimizer.peak_lr: 0.002 -> 0.004",
        "config.precision.compute_dtype: 'bfloat16' -> 'float32'",
        "config.training.micro_batches: 1 -> 4",
        "config.training.num_steps: 400 -> 500",
        "config.training.stop_after_step: None -> 450",
    ]


def test_another_corpus() -> None:
    assert _refusal(_config(), fingerprint="f" * 64) == (
        f"{PLACE} was trained on another corpus (fingerprint 0123456789ab, "
        "config.data.source='stdlib' now has ffffffffffff; the standard library differs between "
        "Python versions); go on with the same or give another --workdir"
    )


def test_another_format() -> None:
    document = {"format": 99}  # what else it holds is not known
    assert _refusal(_config(), document) == (
        f"{PLACE} has format 99, this version reads {FORMAT}; give another --workdir"
    )


def test_a_field_that_is_new_or_gone_counts_as_changed() -> None:
    document = _document()
    document["config"]["model"]["old"] = 5
    del document["config"]["training"]["log_every_steps"]
    assert "config.model.old: 5 -> None" in _refusal(_config(), document)
    del document["config"]["model"]["old"]
    assert check(document, _config(), FINGERPRINT, PLACE) == [
        "config.training.log_every_steps: None -> 10"
    ]
