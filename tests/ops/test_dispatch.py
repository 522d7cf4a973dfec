"""Dispatch over several devices, against every expert on every token."""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.ops import dispatch
from moe_jax.sharding import BATCH, BATCH_AXES, EXPERT_AXES, P

EXPERTS, TOKENS, TOP_K, DIM, HIDDEN = 8, 32, 2, 6, 5
NOWHERE = EXPERTS

MESHES = [
    {},
    {"expert": 2},
    {"expert": 4},
    {"expert": 8},
    {"expert_outer": 2, "expert": 2},
    {"data": 2, "expert": 2},
    {"fsdp": 2, "expert_outer": 2, "expert": 2},
    {"fsdp": 4, "data": 2},
]


def _one_to(expert: int) -> np.ndarray:
    ids = np.full((TOKENS, TOP_K), NOWHERE)
    ids[:, 0] = expert
    return ids


def _random(seed: int, low: int = 0, high: int = EXPERTS, tokens: int = TOKENS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([low + rng.permutation(high - low)[:TOP_K] for _ in range(tokens)])


def _padded(seed: int) -> np.ndarray:
    ids = _random(seed)
    ids[5:9] = ids[-11:] = NOWHERE
    return ids


ROUTINGS = {
    "random": _random(0),
    "one expert": _one_to(3),
    "one pair": np.tile([6, 1], (TOKENS, 1)),
    "experts of the first device of eight": _one_to(0),
    "experts of the last device of two": _random(1, 4, 8),
    "empty experts": np.where(_random(2) % 3 == 0, NOWHERE, _random(2)),
    "padding": _padded(3),
    "padding alone": np.full((TOKENS, TOP_K), NOWHERE),
    "skewed on one source": np.concatenate([np.tile([2, 5], (4, 1)), _random(4, tokens=28)]),
}


class Inputs(NamedTuple):
    x: jax.Array
    weights: jax.Array
    experts: dispatch.Experts


def _inputs(experts: int = EXPERTS, tokens: int = TOKENS) -> Inputs:
    rng = np.random.default_rng(9)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Inputs(
        normal(tokens, DIM),
        rng.uniform(0.2, 1.5, (tokens, TOP_K)).astype(np.float32),
        dispatch.Experts(
            normal(experts, DIM, HIDDEN), normal(experts, DIM, HIDDEN), normal(experts, HIDDEN, DIM)
        ),
    )


def _devices(mesh: dict[str, int]) -> int:
    return math.prod(mesh.values())


@functools.cache
def _compiled(mesh_items: tuple, capacity: int, experts: int, dtype: str = "float32"):
    """A function (inputs, ids, direction) -> result, rounds, gradients on a mesh, compiled once."""
    sizes = dict(mesh_items)
    mesh = make_mesh(**sizes)

    def region(x, weights, experts_, ids):
        local = jax.tree.map(lambda w: jax.lax.pcast(w, ("data", "fsdp"), to="varying"), experts_)
        plan = dispatch.make_plan(ids, experts, capacity, BATCH_AXES)
        y = dispatch.apply_experts(
            x,
            weights,
            local,
            plan,
            axes=EXPERT_AXES,
            capacity=capacity,
            combine_dtype=jnp.dtype(dtype),
        )
        return y, plan.rounds

    specs = Inputs(BATCH, BATCH, dispatch.Experts(*[P(EXPERT_AXES)] * 3))
    mapped = jax.shard_map(region, in_specs=(*specs, BATCH), out_specs=(BATCH, P()))

    def forward_and_gradients(inputs, ids, direction):
        def loss(inputs):
            y, rounds = mapped(*inputs, ids)
            return jnp.sum(y.astype(jnp.float32) * direction), (y, rounds)

        gradients, (y, rounds) = jax.grad(loss, has_aux=True)(inputs)
        return y, rounds, gradients

    compiled = quick_jit(forward_and_gradients)

    def run(inputs, ids, direction):
        with jax.set_mesh(mesh):
            placed = jax.device_put(
                (inputs, ids.astype(np.int32), direction),
                jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), (specs, BATCH, BATCH)),
            )
            return jax.tree.map(np.asarray, compiled(*placed))

    return run


@functools.cache
def _compiled_reference():
    def forward_and_gradients(inputs, ids, direction):
        def loss(inputs):
            y = dispatch.experts_reference(inputs.x, inputs.weights, ids, inputs.experts)
            return jnp.sum(y * direction), y

        gradients, y = jax.grad(loss, has_aux=True)(inputs)
        return y, gradients

    return quick_jit(forward_and_gradients)


def _by_loops(inputs: Inputs, ids: np.ndarray) -> np.ndarray:
    """float64, one choice at a time."""
    result = np.zeros(inputs.x.shape)
    gates, ups, downs = (np.asarray(w, np.float64) for w in inputs.experts)
    for t, k in np.ndindex(*ids.shape):
        if not 0 <= ids[t, k] < len(gates):
            continue
        x, i = inputs.x[t].astype(np.float64), ids[t, k]
        gate = x @ gates[i]
        result[t] += inputs.weights[t, k] * ((gate / (1 + np.exp(-gate)) * (x @ ups[i])) @ downs[i])
    return result


def _expected_rounds(ids: np.ndarray, devices: int, capacity: int, experts: int) -> int:
    fullest = max(
        list(part.reshape(-1)).count(i) for part in np.split(ids, devices) for i in range(experts)
    )
    return math.ceil(fullest / capacity)


def _check(run, inputs: Inputs, ids: np.ndarray, devices: int, capacity: int) -> None:
    direction = np.random.default_rng(1).normal(size=inputs.x.shape).astype(np.float32)
    y, rounds, gradients = run(inputs, ids, direction)
    expected_y, expected_gradients = _compiled_reference()(inputs, ids, direction)
    num_experts = len(inputs.experts.gate_EDF)
    assert rounds == _expected_rounds(ids, devices, capacity, num_experts)
    # Nothing is dropped: a missing choice would be an error of order one.
    chex.assert_trees_all_close(y, expected_y, rtol=1e-5, atol=1e-4)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ROUTINGS)
def test_reference_equals_loops(name: str) -> None:
    inputs, ids = _inputs(), ROUTINGS[name]
    y, _ = _compiled_reference()(inputs, ids, np.ones_like(inputs.x))
    chex.assert_trees_all_close(y, _by_loops(inputs, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_equals_reference_for_every_routing(mesh: dict[str, int]) -> None:
    """Capacity 1.5 times a balanced load: skewed routings take several rounds."""
    capacity = dispatch.capacity(TOKENS // _devices(mesh), TOP_K, EXPERTS, 1.5)
    run = _compiled(tuple(mesh.items()), capacity, EXPERTS)
    for ids in ROUTINGS.values():
        _check(run, _inputs(), ids, _devices(mesh), capacity)


@pytest.mark.parametrize("mesh", [{}, {"expert_outer": 2, "expert": 2}], ids=str)
def test_capacity_of_one_takes_many_rounds(mesh: dict[str, int]) -> None:
    run = _compiled(tuple(mesh.items()), 1, EXPERTS)
    assert run(_inputs(), ROUTINGS["one expert"], _inputs().x)[1] == TOKENS // _devices(mesh)
    for ids in ROUTINGS.values():
        _check(run, _inputs(), ids, _devices(mesh), 1)


def test_more_experts_than_tokens() -> None:
    inputs = _inputs(experts=16, tokens=8)
    ids = np.stack([np.random.default_rng(i).permutation(16)[:TOP_K] for i in range(8)])
    capacity = dispatch.capacity(1, TOP_K, 16, 1.5)
    assert capacity == 1
    run = _compiled((("data", 2), ("expert", 4)), capacity, 16)
    _check(run, inputs, ids, 8, capacity)


@given(
    ids=st.lists(st.integers(-1, EXPERTS), min_size=TOKENS * TOP_K, max_size=TOKENS * TOP_K),
    skew=st.integers(1, EXPERTS),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_ids(ids: list[int], skew: int) -> None:
    """Any ids, the same one twice in a token and ids out of range included."""
    ids_TK = np.array(ids).reshape(TOKENS, TOP_K)
    ids_TK = np.where((ids_TK >= 0) & (ids_TK < EXPERTS), ids_TK % skew, ids_TK)
    run = _compiled((("expert_outer", 2), ("expert", 2)), 3, EXPERTS)
    _check(run, _inputs(), ids_TK, 4, 3)


def test_results_come_back_in_the_combine_dtype() -> None:
    mesh = (("expert", 2),)
    inputs, ids = _inputs(), ROUTINGS["random"]
    y, _, gradients = _compiled(mesh, 6, EXPERTS, "bfloat16")(inputs, ids, inputs.x)
    assert y.dtype == jnp.bfloat16
    chex.assert_type(jax.tree.leaves(gradients), jnp.float32)
    expected = _by_loops(inputs, ids)
    error = np.linalg.norm(y.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 6e-3  # 2^-8 at most, and really rounded


def test_capacity_has_bounds() -> None:
    assert dispatch.capacity(64, 2, 8, 1.5) == 24
    assert dispatch.capacity(64, 2, 8, 1.01) == 17  # rounded up
    assert dispatch.capacity(64, 2, 8, 100.0) == 64  # a token chooses an expert once
    assert dispatch.capacity(1, 2, 256, 1.0) == 1
    assert dispatch.capacity(0, 2, 8, 1.0) == 1


def test_plan_ranks_in_token_order() -> None:
    ids = np.array([[0, 2], [2, 4], [4, 0], [2, 1], [-1, 2], [99, 0]], np.int32)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        make = functools.partial(dispatch.make_plan, num_experts=4, capacity=3, axes=BATCH_AXES)
        plan = quick_jit(
            jax.shard_map(make, in_specs=BATCH, out_specs=dispatch.Plan(BATCH, BATCH, P()))
        )(jax.device_put(ids, jax.NamedSharding(mesh, BATCH)))
    seen: dict[int, int] = {}
    for t, k in np.ndindex(*ids.shape):
        expert = int(ids[t, k])
        if 0 <= expert < 4:
            assert plan.expert_ids_TK[t, k] == expert
            assert plan.rank_TK[t, k] == seen.get(expert, 0)
            seen[expert] = seen.get(expert, 0) + 1
        else:
            assert plan.expert_ids_TK[t, k] == 4
    assert plan.rounds == math.ceil(max(seen.values()) / 3) == 2
