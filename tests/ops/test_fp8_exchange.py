"""Rows that travel in eight bits, there and back, against NumPy; by both back ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, quick_jit, ragged_all_to_all
from fp8_reference import DISPATCHED, DISPATCHED_GRADIENT

from moe_jax.ops import exchange, fp8_recipes, slots
from moe_jax.ops.fp8 import Quantized, dequantize
from moe_jax.ops.fp8_exchange import in_eight_bits, pack, unpack
from moe_jax.sharding import P

DEVICES, TOKENS, TOP_K, DIM = 4, 12, 2, 200  # of all devices; a row is a tile and a part of one
NOWHERE = -1
IDS = np.stack([np.random.default_rng(0).permutation(DEVICES)[:TOP_K] for _ in range(TOKENS)])
IDS[3, 1] = IDS[7] = NOWHERE
# What a device does with the rows that it gets; exact.
FACTORS = 2.0 ** np.arange(DEVICES)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)


@functools.cache
def _compiled(backend: str):
    """(x, dy) to y, the sum over a row's choices of what devices made of it, and dx."""

    def region(x_TD, ids_TK, dy_TD):
        def journey(x_TD):
            plan = exchange.plan(ids_TK, "expert", backend)
            round = plan.one_round(jnp.int32(0), TOKENS, "expert")
            token_of_slot = slots.choice_of_slot(round.slot_of_TK, round.num_slots) // TOP_K
            rows = in_eight_bits(round)
            arrived = rows.there(slots.to_slots(x_TD, token_of_slot, round.slot_of_TK))
            factor = jnp.asarray(FACTORS, x_TD.dtype)[jax.lax.axis_index("expert")]
            back = rows.back(arrived * factor)
            return slots.from_slots(back, token_of_slot, round.slot_of_TK)

        y, pull_back = jax.vjp(journey, x_TD)
        return y, pull_back(dy_TD.astype(y.dtype))[0]

    spec = P("expert")
    return quick_jit(jax.shard_map(region, in_specs=(spec,) * 3, out_specs=(spec, spec)))


def _run(backend: str, x: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
    mesh = make_mesh(expert=DEVICES)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, P("expert"))
        placed = jax.device_put((x, IDS.astype(np.int32), dy), rows)
        return [np.asarray(a, np.float32) for a in _compiled(backend)(*placed)]


def _data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.standard_t(1.5, (TOKENS, DIM)) * 10.0 ** rng.integers(-3, 4, (TOKENS, 1))
    dy = rng.standard_t(1.5, (TOKENS, DIM)) * 1e-9
    x[5] = 0
    return x.astype(np.float32), dy.astype(np.float32)


def _summed(rows: np.ndarray) -> np.ndarray:
    factors = np.where(IDS == NOWHERE, 0, FACTORS[IDS]).astype(np.float32)
    return np.sum(factors[:, :, None] * rows[:, None], axis=1)


@pytest.mark.parametrize("backend", ["padded", "ragged"])
def test_rows_go_there_in_eight_bits_and_gradients_of_what_came_back_too(backend: str) -> None:
    x, dy = _data()
    y, dx = _run(backend, x, dy)
    np.testing.assert_array_equal(y, _summed(DISPATCHED.rounded(x, 1)))
    np.testing.assert_array_equal(dx, _summed(DISPATCHED_GRADIENT.rounded(dy, 1)))
    assert np.any(y != _summed(x)), "something was rounded"


@pytest.mark.parametrize("backend", ["padded", "ragged"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_arrives_as_none(backend: str, bad: float) -> None:
    x, dy = _data()
    whole = _run(backend, x, dy)
    x[2, 150], dy[4, 7] = bad, -bad
    broken = _run(backend, x, dy)
    tiles = (2, slice(128, None)), (4, slice(0, 128))
    for before, after, tile in zip(whole, broken, tiles, strict=True):
        expected = before.copy()
        expected[tile] = np.nan
        np.testing.assert_array_equal(after, expected)


def test_a_message_holds_every_number_and_scale() -> None:
    """All numbers of the format times all scales that are powers of two."""
    values = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    scales = 2.0 ** np.arange(-126, 120.0)
    x = Quantized(
        jnp.tile(values, (len(scales), 1)),
        jnp.asarray(np.stack([scales, scales[::-1]], axis=1), jnp.float32),
    )
    message = pack(x)
    assert (message.dtype, message.shape) == (jnp.uint8, (len(scales), 256 + 2))
    got = unpack(message, 256, fp8_recipes.DISPATCHED)
    numbers = [np.asarray(dequantize(q, (1, 128))) for q in (got, x)]
    np.testing.assert_array_equal(*numbers)


def test_a_place_that_nothing_came_to_holds_zeros() -> None:
    got = unpack(jnp.zeros((1, DIM + 2), jnp.uint8), DIM, fp8_recipes.DISPATCHED)
    np.testing.assert_array_equal(dequantize(got, (1, 128)), np.zeros((1, DIM)))
