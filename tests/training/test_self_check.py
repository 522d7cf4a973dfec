"""The check of the ragged exchange before a run, on an emulated one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh, ragged_all_to_all

from moe_jax.config import BackendConfig, Config, ModelConfig, PrecisionConfig, UserError
from moe_jax.sharding import P
from moe_jax.training.self_check import _place, check_exchange

MESH = {"data": 2, "expert": 2}


def _config(exchange: str) -> Config:
    return Config(
        model=ModelConfig(backends=BackendConfig(exchange=exchange)),
        precision=PrecisionConfig(compute_dtype="float32"),
    )


def _check(exchange: str, mesh: dict[str, int] = MESH) -> list[str]:
    with jax.set_mesh(make_mesh(**mesh)):
        return check_exchange(_config(exchange))


def test_an_exchange_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    (line,) = _check("ragged")
    assert line.startswith("exchange    ragged; its gradients equal the padded one's within ")
    assert float(line.split()[-1]) < 1e-5


def _first_row_lost(*arguments: Any, **options: Any) -> jax.Array:
    return ragged_all_to_all(*arguments, **options).at[0].set(0)


def test_an_exchange_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", _first_row_lost)
    with pytest.raises(UserError, match=r"by [\d.]+ of its largest value; set config.model.backe"):
        _check("ragged")


def test_a_device_draws_its_own_part_and_no_more() -> None:
    drawn = []

    def draw(rng: np.random.Generator) -> np.ndarray:
        drawn.append(rng)
        return rng.normal(size=(3, 2))

    with jax.set_mesh(make_mesh(**MESH)):
        x = _place(draw, jnp.dtype("float32"), P("expert"))
    assert len(drawn) <= 1 + 4  # the shape, and each of four devices
    parts = np.asarray(x).reshape(2, 3, 2)
    assert (parts[0] != parts[1]).all()
    for shard in x.addressable_shards:  # replicas are equal
        np.testing.assert_array_equal(shard.data, np.asarray(x)[shard.index])


def test_nothing_to_check() -> None:
    assert _check("padded") == []
    assert _check("auto") == []  # on CPU
    assert _check("ragged", {"fsdp": 2}) == []  # nothing is exchanged
