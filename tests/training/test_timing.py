"""Which stages' steps are compiled, and when they are let go."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
from step_runs import CONFIG

from moe_jax.curriculum import stage_at
from moe_jax.training.timing import CompiledSteps, memory_of


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


def test_memory_of_a_program_is_its_arguments_and_what_it_makes_in_between():
    def function(x):
        return jnp.sort(x * 2)[::-1] + x

    compiled = jax.jit(function).lower(jnp.zeros(1000)).compile()
    arguments, besides = memory_of(compiled)
    assert arguments == 4000
    assert besides >= 4000  # the sorted values; JAX from 0.11 on counts the result as well
