"""Bad steps: named, skipped, rolled back, given up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import fault_runs
from moe_jax.config import CollapseConfig, RecoveryConfig
from moe_jax.fields import RunError
from moe_jax.training import loop, timing
from moe_jax.training.collapse import ExpertWatch
from moe_jax.training.recovery import Guard


def _rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _run(
    place: str,
    at: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> list[dict[str, Any]]:
    source = fault_runs.write_corpus(tmp_path / "corpus")
    poisoned = fault_runs.poisoned(timing.make_train_step, place, at)
    monkeypatch.setattr(timing, "make_train_step", poisoned)
    changes = {"mesh.num_cpu_devices": 8, "mesh.fsdp": 4, **changes}
    loop.train(fault_runs.config(source, changes), tmp_path / "run")
    return [row for row in _rows(tmp_path / "run") if "loss" in row]


@pytest.mark.parametrize(
    ("place", "named", "rollback"),
    [
        ("batch", "the loss is not finite", False),
        ("gradient", "the gradient is not finite", True),
        ("expert", "parameters/moe_blocks/moe/gate[0, 7, 15, 7] is not finite", True),
        ("bias", "router_bias/moe_blocks/moe/router/bias[0, 7] is not finite", True),
    ],
)
def test_a_nan_is_named_skipped_and_recovered_from(
    place: str,
    named: str,
    rollback: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"recovery.max_bad_steps": 2, "training.num_steps": 8}
    rows = _run(place, 5, tmp_path, monkeypatch, changes)
    said = capsys.readouterr().out
    assert "bad         step 5: update skipped: " in said and named in said, said
    bad = [row["step"] for row in rows if row["update_skipped"]]
    assert bad == ([5, 6] if rollback else [5])
    assert ("rolled back to checkpoint 4; the data goes on after step 6" in said) == rollback
    # Two updates that were never made; a rollback loses none that had been.
    assert rows[-1]["skipped_updates"] == len(bad)
    assert np.isfinite(rows[-1]["loss"]) and rows[-1]["step"] == 8


def _metrics(loss: float, finite: bool = True) -> dict[str, Any]:
    return {"loss": loss, "grad_norm": 1.0, "update_skipped": int(not finite)}


class NoCheckpoints:
    def latest(self, before: int) -> None:
        self.asked = before


def _guard(said: list[str], saved: Any = None, **changes: Any) -> Guard:
    checkpoints: Any = NoCheckpoints()
    return Guard(RecoveryConfig(**changes), checkpoints, said.append, saved)


def test_spikes_are_told_from_the_last_good_losses_through_a_restart() -> None:
    said: list[str] = []
    changes = {"spike_sigmas": 6.0, "spike_window": 4, "max_bad_steps": 2}
    guard = _guard(said, **changes)
    for step, loss in enumerate([9.0, 2.0, 2.1, 1.9, 2.0, 2.2], start=1):
        guard.mended(step, _metrics(loss), {}, {})
    assert not said and not guard.bad
    guard.mended(7, _metrics(9.0), {}, {})
    assert "step 7: loss 9.0000 is a spike: the last ones are 2.0500" in said[0]
    guard.mended(8, _metrics(2.0), {}, {})
    assert not guard.bad
    guard.mended(9, _metrics(9.0), {}, {})
    guard = _guard(said, json.loads(json.dumps(guard.state())), **changes)
    with pytest.raises(RunError, match="goes wrong since step 9, and there is no checkpoint"):
        guard.mended(10, _metrics(9.0), {}, {})


def test_after_the_last_rollback_the_run_is_given_up_with_a_report() -> None:
    saved = {"bad": [4], "losses": [], "rollbacks": ["steps 1 to 2: something"]}
    guard = _guard([], saved, max_bad_steps=2, max_rollbacks=1)
    with pytest.raises(RunError, match="wrong 2 times.*steps 1 to 2: something; steps 4 to 5: upd"):
        guard.mended(5, _metrics(2.0, finite=False), {}, {})


def test_bad_steps_alone_roll_nothing_back_if_the_config_says_so() -> None:
    guard = _guard([], max_bad_steps=0)
    for step in range(1, 50):
        state = guard.mended(step, _metrics(2.0, finite=False), {"a": np.ones(1)}, {})
        assert state == {"a": 1}
    assert len(guard.bad) == 49


def _load(*rows: list[int], entropy: float = 1.0) -> dict[str, Any]:
    return {"expert_load": np.array(rows), "router_entropy": np.full(len(rows), entropy)}


def test_collapsing_experts_are_named_once() -> None:
    watch = ExpertWatch(CollapseConfig(dead_steps=2, max_violation=2.0, min_entropy=0.5))
    assert watch.look({}) == []  # a dense model
    assert watch.look(_load([4, 0, 1, 3], [2, 2, 2, 2])) == []
    assert watch.look(_load([4, 0, 1, 3], [0, 8, 0, 0])) == [
        "expert 1 of routed layer 0 has had no token in 2 steps",
        "expert 1 of routed layer 1 has 3.0 times the mean load above it, more than "
        "config.collapse.max_violation=2.0",
    ]
    assert watch.look(_load([4, 0, 1, 3], [1, 8, 1, 1])) == []
    assert watch.look(_load([4, 1, 1, 2], [2, 2, 2, 2], entropy=0.4))[0].startswith(
        "the router of routed layer 0 has an entropy of 0.40 of the largest, below"
    )
    assert watch.look(_load([4, 0, 1, 3], [2, 2, 2, 2])) == []
    again = watch.look(_load([4, 0, 1, 3], [2, 2, 2, 2]))
    assert again == ["expert 1 of routed layer 0 has had no token in 2 steps"]


def test_a_collapse_may_end_the_run() -> None:
    with pytest.raises(RunError, match="expert 1 of routed layer 0 .*config.collapse.stop=True"):
        ExpertWatch(CollapseConfig(dead_steps=1, stop=True)).look(_load([2, 0]))
