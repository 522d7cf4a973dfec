"""Which stages' steps are compiled, and when they are let go."""

import contextlib
import dataclasses

import jax
from step_runs import CONFIG

from moe_jax.curriculum import stage_at
from moe_jax.training.timing import CompiledSteps


def test_a_step_is_compiled_once_for_its_shape_until_it_is_let_go(monkeypatch):
    compiled = []
    monkeypatch.setattr(CompiledSteps, "_compile", lambda self, stage: compiled.append(stage))
    first = stage_at(CONFIG, 0)
    second = dataclasses.replace(first, sequence_length=2 * first.sequence_length)
    mesh = jax.make_mesh((1,), ("data",))
    with contextlib.closing(CompiledSteps(CONFIG, mesh, {})) as steps:
        assert steps.start(first)
        assert not steps.start(dataclasses.replace(first, learning_rate_factor=0.5))
        assert steps.start(second)
        steps.keep([second])
        assert not steps.start(second)
        assert steps.start(first)
        steps.wait(first)
    assert compiled == [first, second, first]
