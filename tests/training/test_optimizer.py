"""The update against optax's own AdamW, and which parameters decay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import OptimizerConfig
from moe_jax.training.optimizer import AdamW, decayed

CONFIG = OptimizerConfig(weight_decay=0.5, eps=1e-3, clip_norm=1.0)
NUM_STEPS = 10


def _tree(seed: int, size: float) -> dict:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(size * rng.standard_normal(shape), jnp.float32)

    return {
        "embedding": {"weight": array(5, 3)},
        "moe_blocks": {
            "mlp_norm": {"scale": array(2, 3)},
            "moe": {"gate": array(2, 4, 3, 2), "router": {"weight": array(2, 3, 4)}},
        },
    }


@pytest.mark.parametrize("decay_all", [False, True])
def test_updates_are_those_of_optax(decay_all: bool) -> None:
    names_that_decay = {
        "embedding": {"weight": True},
        "moe_blocks": {
            "mlp_norm": {"scale": decay_all},
            "moe": {"gate": True, "router": {"weight": decay_all}},
        },
    }
    rates = jnp.linspace(0.1, 0.01, NUM_STEPS)
    reference = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(
            lambda count: rates[count],
            b1=CONFIG.b1,
            b2=CONFIG.b2,
            eps=CONFIG.eps,
            weight_decay=CONFIG.weight_decay,
            mask=names_that_decay,
        ),
    )
    ours = AdamW(dataclasses.replace(CONFIG, decay_all=decay_all))
    parameters = expected = _tree(0, 1.0)
    moments, state = ours.init(parameters), reference.init(expected)
    step, reference_step = jax.jit(ours.update), jax.jit(reference.update)
    for update in range(NUM_STEPS):
        # Both sides of the clipping norm.
        gradients = _tree(update + 1, 3.0 if update % 2 else 0.01)
        parameters, moments = step(gradients, moments, parameters, jnp.int32(update), rates[update])
        changes, state = reference_step(gradients, state, expected)
        expected = optax.apply_updates(expected, changes)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            parameters,
            expected,
        )
    assert set(moments) == {"mu", "nu"}


@pytest.mark.parametrize("decay_all", [False, True])
def test_what_decays(decay_all: bool) -> None:
    assert decayed(_tree(0, 1.0), decay_all) == {
        "embedding": {"weight": True},
        "moe_blocks": {
            "mlp_norm": {"scale": decay_all},
            "moe": {"gate": True, "router": {"weight": decay_all}},
        },
    }
