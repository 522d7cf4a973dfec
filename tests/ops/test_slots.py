"""Places by counting, and the two gathers that are each other's transpose."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import quick_jit

from moe_jax.ops import slots


@pytest.mark.parametrize("number", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("groups", [1, 5])
def test_ranks_count_earlier_choices_of_the_same_group(number: int, groups: int) -> None:
    group = np.random.default_rng(number).integers(-1, groups + 1, number).astype(np.int32)
    rank, load = quick_jit(slots.ranks, static_argnums=1)(group, groups)
    seen = [0] * groups
    for i, g in enumerate(group):
        if 0 <= g < groups:
            assert rank[i] == seen[g]
            seen[g] += 1
    chex.assert_trees_all_equal(load, np.array(seen, np.int32))


def test_ways_are_each_others_transpose() -> None:
    rng = np.random.default_rng(0)
    slot_of = np.array([[4, 6], [0, 6], [6, 6], [5, 2]], np.int32)  # 6 slots; 1 and 3 are empty
    token_of = slots.choice_of_slot(jnp.asarray(slot_of), 6) // 2
    chex.assert_trees_all_equal(token_of, np.array([1, 4, 3, 4, 0, 3], np.int32))
    x, y = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (4, 6))
    there, pull_x = jax.vjp(lambda x: slots.to_slots(x, token_of, slot_of), x)
    back, pull_y = jax.vjp(lambda y: slots.from_slots(y, token_of, slot_of), y)
    chex.assert_trees_all_close(there[np.array([1, 3])], jnp.zeros((2, 3)))
    chex.assert_trees_all_close(pull_x(y)[0], back)
    chex.assert_trees_all_close(pull_y(x)[0], there)
    np.testing.assert_allclose(np.sum(there * y), np.sum(back * x), rtol=1e-5)
