"""The mesh and the rules from parameters to mesh axes."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh
from jax.sharding import AxisType

from moe_jax import sharding
from moe_jax.config import MESH_AXES, MeshConfig
from moe_jax.sharding import BATCH, BATCH_AXES, EXPERT_AXES, P


def test_free_axis_takes_the_devices_that_are_left() -> None:
    sizes = sharding.mesh_sizes(MeshConfig(expert=4), 8)
    assert sizes == {axis: 1 for axis in MESH_AXES} | {"fsdp": 2, "expert": 4}
    sizes = sharding.mesh_sizes(MeshConfig(fsdp=2, data=-1, expert_outer=2), 8)
    assert (sizes["data"], sizes["fsdp"], sizes["expert_outer"]) == (2, 2, 2)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(expert=3), "expert=3"),
        (MeshConfig(fsdp=2, expert=2), "fsdp=2 * expert=2"),
        (MeshConfig(data=4, fsdp=4), "data=4 * fsdp=4"),
        (MeshConfig(expert=16), "expert=16"),
        (MeshConfig(fsdp=1), "every axis 1"),
    ],
    ids=["does not divide", "too few", "too many", "more than all", "one"],
)
def test_sizes_that_do_not_fit_are_named(config: MeshConfig, sizes: str) -> None:
    with pytest.raises(ValueError, match="does not fit 8 devices") as error:
        sharding.mesh_sizes(config, 8)
    assert sizes in str(error.value)


def test_mesh_has_all_axes_explicit_and_fast_ones_last() -> None:
    mesh = make_mesh(data=2, fsdp=2, expert=2)
    assert set(mesh.axis_names) == set(MESH_AXES)
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"] == mesh.size == 8
    order = [mesh.axis_names.index(axis) for axis in ("data", "fsdp", "expert_outer", "expert")]
    assert order == sorted(order)
    # Experts' neighbours are neighbouring devices; replicas are the furthest apart.
    ids = np.vectorize(lambda device: device.id)(mesh.devices).reshape(2, 2, 2)
    chex.assert_trees_all_equal(ids, np.arange(8).reshape(2, 2, 2))


def test_parameters_are_split_over_the_leading_axes_that_divide_them() -> None:
    with jax.set_mesh(make_mesh(fsdp=2, expert_outer=2, expert=2)):
        spec = sharding.parameter_spec
        assert spec((4, 6), ("embed", None)) == P(("fsdp",), None)
        assert spec((6, 4), (None, "latent")) == P(None, ("fsdp",))
        assert spec((5, 4), ("embed", None)) == P(None, None)  # 2 does not divide 5
        assert spec((8, 4, 3), ("experts", "embed", None)) == P(EXPERT_AXES, ("fsdp",), None)
        assert spec((6, 4, 3), ("experts", "embed", None)) == P(("expert_outer",), ("fsdp",), None)
        assert spec((4, 8), ("embed", "wide")) == P(("fsdp",), EXPERT_AXES)
        assert spec((4, 6), ("embed", "wide")) == P(("fsdp",), ("expert_outer",))
        assert sharding.without(spec((4, 8), ("embed", "wide")), EXPERT_AXES) == P(("fsdp",), None)
        with pytest.raises(AssertionError):
            spec((4, 6), ("embed",))
        with pytest.raises(KeyError):
            spec((4,), ("no such rule",))


def test_gather_is_the_whole_parameter_and_its_gradient_is_split_again() -> None:
    mesh = make_mesh(fsdp=2, expert=2)
    with jax.set_mesh(mesh):
        value = np.arange(12.0, dtype=np.float32).reshape(4, 3)
        parameter = jax.device_put(value, jax.NamedSharding(mesh, P("fsdp", None)))
        x = jax.device_put(np.ones((4, 4), np.float32), jax.NamedSharding(mesh, BATCH))
        whole = jax.jit(sharding.gather)(parameter)
        assert whole.sharding.is_fully_replicated
        chex.assert_trees_all_equal(np.asarray(whole), value)
        loss = lambda p: jnp.sum((x @ sharding.gather(p)) ** 2)  # noqa: E731
        gradient = jax.jit(jax.grad(loss))(parameter)
        assert gradient.sharding.spec == P("fsdp", None)
        expected = 2 * np.ones((4, 4)).T @ (np.ones((4, 4)) @ value)
        chex.assert_trees_all_close(np.asarray(gradient), expected)


@pytest.mark.parametrize("keep", [0, 1])
def test_gather_over_inside_a_region_and_its_transpose(keep: int) -> None:
    mesh = make_mesh(fsdp=2, expert_outer=2, expert=2)
    spec = P(EXPERT_AXES, ("fsdp",), None)
    value = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    factors = np.arange(1.0, 9.0, dtype=np.float32)  # one a device
    with jax.set_mesh(mesh):
        parameter = jax.device_put(value, jax.NamedSharding(mesh, spec))
        placed = jax.device_put(factors, jax.NamedSharding(mesh, BATCH))

        def region(shard, factor):
            whole = sharding.gather_over(shard, spec, keep=keep)
            assert whole.shape == ((1, 6, 3) if keep else (4, 6, 3))
            return factor * jnp.sum(whole**2)

        mapped = jax.shard_map(region, in_specs=(spec, BATCH), out_specs=BATCH)
        value_and_gradient = jax.jit(jax.value_and_grad(lambda p: jnp.sum(mapped(p, placed))))
        total, gradient = value_and_gradient(parameter)
        assert gradient.sharding.spec == parameter.sharding.spec
    # With the experts kept apart, expert i is only in the loss of its own devices, one a part of
    # fsdp: devices i and 4 + i. Without, every device sees everything.
    scale = np.stack([factors[i] + factors[4 + i] for i in range(4)]) if keep else np.full(4, 36.0)
    scale = scale[:, None, None]
    chex.assert_trees_all_close(total, np.sum(scale * value**2), rtol=1e-5)
    chex.assert_trees_all_close(np.asarray(gradient), 2 * scale * value, rtol=1e-5)


def test_batch_sharding_splits_rows_alone() -> None:
    mesh = make_mesh(data=2, fsdp=2, expert=2)
    rows = jax.device_put(np.arange(2 * 16 * 3).reshape(2, 16, 3), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 2, 3)}
    assert sharding.num_shards(dict(mesh.shape), BATCH_AXES) == 8
    assert sharding.num_shards(dict(mesh.shape), EXPERT_AXES) == 2


def test_one_process_feeds_all_rows() -> None:
    assert sharding.process_share(make_mesh(data=2, expert=2)) == (0, 4, 4)


def _mesh_of_processes(processes: list[int], **sizes: int) -> SimpleNamespace:
    """As much of a mesh as `process_share` reads, on devices of these processes in order."""
    shape = {axis: sizes.get(axis, 1) for axis in sharding.DEVICE_ORDER}
    devices = np.array([SimpleNamespace(process_index=p) for p in processes], object)
    return SimpleNamespace(shape=shape, devices=devices.reshape(list(shape.values())))


def test_share_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for sizes in ({"data": 4, "expert": 2}, {"fsdp": 2, "expert_outer": 2, "expert": 2}):
        mesh = _mesh_of_processes([0, 0, 1, 1, 2, 2, 3, 3], **sizes)
        assert sharding.process_share(mesh) == (2, 4, 8)
    with pytest.raises(ValueError, match=r"process 1 hold parts \[1, 3\]"):
        sharding.process_share(_mesh_of_processes([0, 1, 0, 1], data=2, fsdp=2))
    # Devices that differ along another axis hold the same rows.
    mesh = _mesh_of_processes([0, 0, 1, 1], data=2, tensor=2)
    assert sharding.process_share(mesh) == (1, 2, 2)


def test_slow_links_cut_the_outer_axes() -> None:
    sizes = {"data": 2, "fsdp": 6, "expert_outer": 2, "expert": 8}
    sizes = {axis: sizes.get(axis, 1) for axis in sharding.DEVICE_ORDER}

    def cut(islands: int) -> dict[str, int]:
        return {a: n for a, n in sharding.slow_parts(sizes, islands).items() if n > 1}

    assert cut(1) == {}
    assert cut(2) == {"data": 2}
    assert cut(12) == {"data": 2, "fsdp": 6}
    assert cut(8) == {"data": 2, "fsdp": 2, "expert_outer": 2}
    assert cut(16) == {"data": 2, "fsdp": 2, "expert_outer": 2, "expert": 2}  # as a last resort
    with pytest.raises(ValueError, match=r"fsdp=6.*cannot be cut into 5 equal slices"):
        cut(5)


@pytest.mark.aot
@pytest.mark.parametrize(("topology", "slices"), [("v5e:4x4", 4), ("v5p:4x4x4", 2)])
def test_experts_stay_within_a_slice(topology: str, slices: int) -> None:
    """On compile-only devices of several TPU slices."""
    from jax.experimental import topologies

    from moe_jax.planning.topologies import prepare
    from moe_jax.training.summary import machine

    prepare()
    devices = topologies.get_topology_desc(
        topology_name=topology, platform="tpu", num_slices=slices
    ).devices
    config = MeshConfig(data=2, fsdp=-1, expert_outer=2, expert=4)
    mesh = sharding.make_mesh(config, devices)
    slice_of = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    # [outer axes, those that must stay within]
    slice_of = slice_of.reshape(-1, 4)
    assert (slice_of == slice_of[:, :1]).all() and len(np.unique(slice_of)) == slices
    fsdp = f", fsdp {slices // 2}" if slices > 2 else ""
    expected = f"links       {slices} slices or hosts; between them data 2{fsdp}"
    assert machine(mesh, 1e12, "known")[1] == expected
