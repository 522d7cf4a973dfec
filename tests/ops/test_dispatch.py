"""Dispatch over several devices, against every expert on every token."""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, quick_jit, ragged_all_to_all
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.ops import dispatch, grouped_matmul
from moe_jax.ops.backends import Backends
from moe_jax.ops.grouped_matmul import Experts
from moe_jax.sharding import BATCH, BATCH_AXES, EXPERT_AXES, P

EXPERTS, TOKENS, TOP_K, DIM, HIDDEN = 8, 32, 2, 6, 5
NOWHERE = EXPERTS
EXCHANGES = ("ragged", "padded")

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


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)


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
    experts: Experts


def _inputs(experts: int = EXPERTS, tokens: int = TOKENS) -> Inputs:
    rng = np.random.default_rng(9)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Inputs(
        normal(tokens, DIM),
        rng.uniform(0.2, 1.5, (tokens, TOP_K)).astype(np.float32),
        Experts(normal(experts, DIM, 2 * HIDDEN), normal(experts, HIDDEN, DIM)),
    )


def _devices(mesh: dict[str, int]) -> int:
    return math.prod(mesh.values())


@functools.cache
def _compiled(
    mesh_items: tuple,
    buffer_factor: float,
    experts: int = EXPERTS,
    dtype: str = "float32",
    exchange: str = "padded",
    parts: int = 1,
):
    """A function (inputs, ids, direction) -> result, rounds, gradients on a mesh, compiled once."""
    sizes = dict(mesh_items)
    mesh = make_mesh(**sizes)

    def region(x, weights, experts_, ids):
        local = jax.tree.map(lambda w: jax.lax.pcast(w, ("data", "fsdp"), to="varying"), experts_)
        y, rounds = dispatch.apply_experts(
            x,
            weights,
            ids,
            local,
            dispatch.Balanced(len(x), TOP_K, experts, buffer_factor),
            axes=EXPERT_AXES,
            all_axes=BATCH_AXES,
            combine_dtype=jnp.dtype(dtype),
            backends=Backends(exchange=exchange),
            parts=parts,
        )
        return y, rounds

    specs = Inputs(BATCH, BATCH, Experts(*[P(EXPERT_AXES)] * 2))
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
    gate_ups, downs = (np.asarray(w, np.float64) for w in inputs.experts[:2])
    for t, k in np.ndindex(*ids.shape):
        if not 0 <= ids[t, k] < len(downs):
            continue
        x, i = inputs.x[t].astype(np.float64), ids[t, k]
        gate, up = np.split(x @ gate_ups[i], 2)
        result[t] += inputs.weights[t, k] * ((gate / (1 + np.exp(-gate)) * up) @ downs[i])
    return result


def _expected_exchanges(ids: np.ndarray, mesh: dict[str, int], capacity: int) -> int:
    """Along one axis of experts: rounds until the fullest buffer of any device is empty."""
    devices = mesh.get("expert", 1)
    tokens_of = [
        sum(bool(np.any(token // (EXPERTS // devices) == device)) for token in part)
        for part in np.split(ids, _devices(mesh))
        for device in range(devices)
    ]
    return max(1, math.ceil(max(tokens_of) / capacity))


def _check(run, inputs: Inputs, ids: np.ndarray) -> int:
    direction = np.random.default_rng(1).normal(size=inputs.x.shape).astype(np.float32)
    y, rounds, gradients = run(inputs, ids, direction)
    expected_y, expected_gradients = _compiled_reference()(inputs, ids, direction)
    # Nothing is dropped: a missing choice would be an error of order one.
    chex.assert_trees_all_close(y, expected_y, rtol=1e-5, atol=1e-4)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-5, atol=1e-4)
    return int(rounds)


@pytest.mark.parametrize("name", ROUTINGS)
def test_reference_equals_loops(name: str) -> None:
    inputs, ids = _inputs(), ROUTINGS[name]
    y, _ = _compiled_reference()(inputs, ids, np.ones_like(inputs.x))
    chex.assert_trees_all_close(y, _by_loops(inputs, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_equals_reference_for_every_routing(mesh: dict[str, int]) -> None:
    """Buffers of a balanced load: skewed routings take several rounds."""
    run = _compiled(tuple(mesh.items()), 1.0)
    devices = mesh.get("expert", 1)
    tokens = TOKENS // _devices(mesh)
    capacity = dispatch.Balanced(tokens, TOP_K, EXPERTS, 1.0).rows(EXPERTS // devices)
    rounds = {name: _check(run, _inputs(), ids) for name, ids in ROUTINGS.items()}
    if "expert_outer" in mesh:
        return
    for name, ids in ROUTINGS.items():
        exchanges = _expected_exchanges(ids, mesh, capacity)
        # Two choices of one token on a device may take it one more pass over its experts.
        assert exchanges <= rounds[name] <= exchanges + (name not in ("random", "one expert"))


@pytest.mark.parametrize("mesh", [{"expert": 2}, {"expert_outer": 2, "expert": 2}], ids=str)
def test_tiny_buffers_take_many_rounds(mesh: dict[str, int]) -> None:
    run = _compiled(tuple(mesh.items()), 1e-6)
    rounds = {name: _check(run, _inputs(), ids) for name, ids in ROUTINGS.items()}
    # One token at a time, to each group of devices and in it to each device.
    assert rounds["one expert"] == TOKENS // _devices(mesh) * mesh.get("expert_outer", 1)
    assert rounds["padding alone"] == 1


@pytest.mark.parametrize(
    ("mesh", "factor"),
    [
        ({"expert": 4}, 1.0),
        ({"expert": 2}, 1e-6),
        ({"fsdp": 2, "expert_outer": 2, "expert": 2}, 1.0),
    ],
    ids=str,
)
def test_ragged_exchange_equals_reference(mesh: dict[str, int], factor: float) -> None:
    """A buffer is shared by all sources: no more rounds than with a part for each."""
    ragged, padded = (_compiled(tuple(mesh.items()), factor, exchange=e) for e in EXCHANGES)
    for ids in ROUTINGS.values():
        inputs = _inputs()
        assert _check(ragged, inputs, ids) <= padded(inputs, ids, np.zeros_like(inputs.x))[1]


@pytest.mark.parametrize(
    ("mesh", "factor", "exchange", "parts"),
    [
        ({"expert": 4}, 1.0, "padded", 2),
        ({"expert": 2}, 1e-6, "ragged", 4),
        ({"fsdp": 2, "expert_outer": 2, "expert": 2}, 1.0, "padded", 2),
    ],
    ids=str,
)
def test_tokens_in_parts(mesh: dict[str, int], factor: float, exchange: str, parts: int) -> None:
    run = _compiled(tuple(mesh.items()), factor, exchange=exchange, parts=parts)
    rounds = {name: _check(run, _inputs(), ids) for name, ids in ROUTINGS.items()}
    assert rounds["padding alone"] == 1
    if factor < 1:  # one token of each part and device at a time
        assert rounds["one expert"] == TOKENS // _devices(mesh) // parts


def test_ragged_buffers_are_shared_by_all_sources() -> None:
    """One source sends all its tokens to a device to which others send nothing."""
    inputs, ids = _inputs(), np.full((TOKENS, TOP_K), NOWHERE)
    ids[: TOKENS // 4, 0] = 7
    mesh = (("expert", 4),)
    assert _check(_compiled(mesh, 1.0), inputs, ids) == 2
    assert _check(_compiled(mesh, 1.0, exchange="ragged"), inputs, ids) == 1


@pytest.mark.parametrize("size", [1, 2, 8])
def test_surplus_tiles_go_in_further_rounds(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that gets twice its share of choices, in buffers that hold one."""
    monkeypatch.setattr(grouped_matmul, "tile_size", lambda load, backends: size)
    _compiled.cache_clear()
    run = _compiled((("expert", 2),), 1.0)
    both_here = np.tile([4, 5], (TOKENS, 1))
    exchanges = _expected_exchanges(both_here, {"expert": 2}, 13)
    # 26 tokens in an exchange have 52 choices; tiles of 8 leave room for 64, of 1 for 36.
    assert _check(run, _inputs(), both_here) == exchanges + (size < 8)
    _compiled.cache_clear()


def test_more_experts_than_tokens() -> None:
    inputs = _inputs(experts=16, tokens=8)
    ids = np.stack([np.random.default_rng(i).permutation(16)[:TOP_K] for i in range(8)])
    _check(_compiled((("data", 2), ("expert", 4)), 1.5, 16), inputs, ids)


@given(
    ids=st.lists(st.integers(-1, EXPERTS), min_size=TOKENS * TOP_K, max_size=TOKENS * TOP_K),
    skew=st.integers(1, EXPERTS),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_ids(ids: list[int], skew: int) -> None:
    """Any ids, the same one twice in a token and ids out of range included."""
    ids_TK = np.array(ids).reshape(TOKENS, TOP_K)
    ids_TK = np.where((ids_TK >= 0) & (ids_TK < EXPERTS), ids_TK % skew, ids_TK)
    _check(_compiled((("expert_outer", 2), ("expert", 2)), 0.5), _inputs(), ids_TK)


def test_results_come_back_in_the_combine_dtype() -> None:
    mesh = (("expert", 2),)
    inputs, ids = _inputs(), ROUTINGS["random"]
    y, _, gradients = _compiled(mesh, 1.5, dtype="bfloat16")(inputs, ids, inputs.x)
    assert y.dtype == jnp.bfloat16
    chex.assert_type(jax.tree.leaves(gradients), jnp.float32)
    expected = _by_loops(inputs, ids)
    error = np.linalg.norm(y.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 6e-3  # 2^-8 at most, and really rounded


def test_buffers_are_a_multiple_of_the_balanced_load() -> None:
    """Against routings drawn at random: the share of tokens with a choice on a device."""
    rng = np.random.default_rng(0)
    chosen = rng.permuted(np.tile(np.arange(16), (20_000, 1)), axis=1)[:, :4]
    share = np.mean(np.any(chosen < 2, axis=1))
    rows = dispatch.Balanced(10_000, 4, 16, 1.5).rows(2)
    assert abs(rows - 1.5 * share * 10_000) < 150
    limited = dispatch.Balanced(10_000, 4, 16, 1.5, num_groups=4, limited_groups=2)
    assert limited.rows(4) == 7393  # half choose a group, and but 1 in 70 of them none of its four
    assert limited.rows(6) == limited.rows(8)  # two groups, one of them in part
    assert dispatch.Balanced(64, 2, 8, 100.0).rows(2) == 64  # no more than there are
    assert dispatch.Balanced(1, 2, 256, 1.0).rows(1) == 1
    assert dispatch.Balanced(64, 2, 8, 1.0).rows(8) == 64  # every token goes to the only device
