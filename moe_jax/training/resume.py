"""What a checkpoint says of its run, and whether this run may go on from it."""

import json
from typing import Any

from moe_jax.config import WEIGHTLESS, Config, UserError
from moe_jax.fields import differing, to_dict
from moe_jax.training import processes

FORMAT = 4
# The batches, the model and the state's names depend on these; anything else may change.
FIXED = ("config.model", "config.data", "config.seed", "config.training.tokens_per_step")
# Of those, what changes nothing. The corpus itself is compared by its fingerprint.
FREE = (
    *("config.data.source", "config.data.prefetch", "config.data.skip_invalid"),
    *("config.data.tokenizer", "config.data.cache"),
    *(f"config.model.{name}" for name in WEIGHTLESS),
)


def describe(config: Config, fingerprint: str, data_state: dict[str, Any]) -> dict[str, Any]:
    """The document that is saved beside the state; every process must call this.

    Args:
      fingerprint: of the corpus.
      data_state: of this process's loader.
    """
    return {
        "format": FORMAT,
        "config": to_dict(config),
        "corpus": fingerprint,
        "data": {
            "step": data_state["step"],
            "streams": _merge_over_processes(data_state["streams"]),
        },
    }


def _merge_over_processes(streams: dict[str, Any]) -> dict[str, Any]:
    """The streams of all processes."""
    merged: dict[str, Any] = {}
    for text in processes.gathered(json.dumps(streams)):
        merged |= json.loads(text)
    return merged


def check(document: dict[str, Any], config: Config, fingerprint: str, place: str) -> list[str]:
    """Whether `config` may go on from the checkpoint at `place`.

    Returns:
      The fields that differ and may: "config.optimizer.peak_lr: 0.002 -> 0.001".
    Raises:
      ValueError: of another format, another corpus, or with other values in fields that may not
        change.
    """
    if document["format"] != FORMAT:
        raise UserError(
            f"{place} has format {document['format']}, this version reads {FORMAT}; give another "
            "--workdir"
        )
    changed = {
        name: f"{name}: {before!r} -> {now!r}"
        for name, (before, now) in sorted(differing(document["config"], to_dict(config)).items())
    }
    fatal = [text for name, text in changed.items() if name.startswith(FIXED) and name not in FREE]
    if fatal:
        raise UserError(
            f"{place} was written under another configuration ({'; '.join(fatal)}); set these back "
            "or give another --workdir"
        )
    if document["corpus"] != fingerprint:
        raise UserError(
            f"{place} was trained on another corpus (fingerprint {document['corpus'][:12]}, "
            f"config.data.source={config.data.source!r} now has {fingerprint[:12]}; the standard "
            "library differs between Python versions); go on with the same or give another "
            "--workdir"
        )
    return list(changed.values())
