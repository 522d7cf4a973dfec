"""The mesh, its axes, and the rules from a parameter's logical axes to mesh axes.

This is the one file that spells mesh axes for parameters and activations. All seven axes are
always present, of size 1 where unused, so that no code asks whether an axis exists. They are
explicit (`AxisType.Explicit`): a wrong or missing sharding is an error when tracing.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config import MESH_AXES, MeshConfig, UserError

# From slow links to fast ones: neighbours along the last axis are neighbours in the machine, and
# what the links between slices or hosts cut, they cut along the first axes that they can.
DEVICE_ORDER = ("pipeline", "data", "fsdp", "expert_outer", "expert", "context", "tensor")
FAST_AXES = ("expert", "context", "tensor")  # which such links had better not cut
EXPERT_AXES = ("expert_outer", "expert")
BATCH_AXES = ("data", "fsdp", "expert_outer", "expert")
BATCH = P(BATCH_AXES)  # activations: rows are split, everything behind them is whole

# A logical axis of a parameter and the mesh axes that split it.
RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp",),  # the model dim
    "latent": ("fsdp",),  # MLA's compressed dims, where they are a product's input
    "experts": EXPERT_AXES,
    "wide": EXPERT_AXES,  # a dense weight's other dim: heads, hidden or latent dims, vocabulary
}


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of each mesh axis on `num_devices` devices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    product = " * ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
    if free and num_devices % known == 0:
        sizes[free[0]] = num_devices // known
    elif free or known != num_devices:
        what = f"{known} does not divide them" if free else f"the sizes multiply to {known}"
        raise UserError(
            f"config.mesh ({product or 'every axis 1'}) does not fit {num_devices} devices: "
            f"{what}; change a size (one may be -1, the devices that are left) or num_cpu_devices"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of them if None).

    Raises:
      ValueError: sizes do not multiply to the number of devices, or cannot be cut into slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    shape = tuple(sizes[axis] for axis in DEVICE_ORDER)
    islands = num_islands(devices)
    # Axes of a TPU's torus are split where the sizes ask for it: eight chips of a row of four.
    if islands == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        slow = slow_parts(sizes, islands)
        between = tuple(slow[axis] for axis in DEVICE_ORDER)
        within = tuple(size // part for size, part in zip(shape, between, strict=True))
        placed = mesh_utils.create_hybrid_device_mesh(
            within, between, devices, allow_split_physical_axes=True
        )
    return Mesh(placed, DEVICE_ORDER, axis_types=(AxisType.Explicit,) * len(shape))


def num_islands(devices: Sequence[jax.Device]) -> int:
    """How many groups of devices there are with fast links inside: slices, or hosts of GPUs."""
    if devices[0].platform == "cpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def slow_parts(sizes: dict[str, int], islands: int) -> dict[str, int]:
    """Into how many parts each axis is cut by the slow links between islands.

    Raises:
      ValueError: no axes have such parts.
    """
    parts, left = {}, islands
    for axis in DEVICE_ORDER:
        parts[axis] = math.gcd(sizes[axis], left)
        left //= parts[axis]
    if left > 1:
        given = " * ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise UserError(
            f"config.mesh ({given}) cannot be cut into {islands} equal slices or hosts; make data "
            f"or fsdp a multiple of {islands}"
        )
    return parts


def abstract_mesh(sizes: dict[str, int], platform: str = "cpu") -> AbstractMesh:
    """A mesh without devices, to trace for.

    Args:
      sizes: of `mesh_sizes`.
      platform: whose back ends "auto" means; "cpu", "gpu" or "tpu".
    """
    shape = tuple(sizes[axis] for axis in DEVICE_ORDER)
    device = AbstractDevice(platform, None, platform)
    types = (AxisType.Explicit,) * len(shape)
    return AbstractMesh(shape, DEVICE_ORDER, types, abstract_device=device)


def num_shards(mesh_shape: dict[str, int], axes: Sequence[str]) -> int:
    """Into how many parts these axes split a dim."""
    return math.prod(mesh_shape[axis] for axis in axes)


def parameter_spec(shape: Sequence[int], logical_axes: Sequence[str | None]) -> P:
    """How a parameter is split on the current mesh.

    A dim that the rule's mesh axes do not divide is split over the longest leading part of them
    that does: 7168 = 1024 * 7 over 2,048 devices must not need a rule of its own.
    """
    assert len(shape) == len(logical_axes), (shape, logical_axes)
    mesh_shape = dict(jax.sharding.get_abstract_mesh().shape)
    rules = [RULES[name] if name else () for name in logical_axes]
    spec = [dividing(size, axes, mesh_shape) for size, axes in zip(shape, rules, strict=True)]
    return P(*(axes or None for axes in spec))


def dividing(size: int, axes: tuple[str, ...], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The longest leading part of these mesh axes that divides a dim of this size."""
    while axes and size % num_shards(mesh_shape, axes):
        axes = axes[:-1]
    return axes


def split_axes(spec: P, dim: int) -> tuple[str, ...]:
    """The mesh axes that split a dim of an array with this sharding."""
    axes = spec[dim] if dim < len(spec) else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def without(spec: P, axes: Sequence[str]) -> P:
    """The sharding whose dims are not split over these mesh axes."""
    kept = (
        tuple(axis for axis in split_axes(spec, dim) if axis not in axes)
        for dim in range(len(spec))
    )
    return P(*(dim or None for dim in kept))


def gather(parameter: jax.Array) -> jax.Array:
    """The whole parameter on every device, just before its use."""
    return jax.sharding.reshard(parameter, P())


def gather_over(shard: jax.Array, spec: P, *, keep: int = 0) -> jax.Array:
    """Inside a `shard_map`: a parameter's shard gathered along all dims from `keep` on.

    Its transpose is the reduce-scatter that a gradient needs.
    """
    for dim in sorted(range(keep, len(spec)), key=lambda dim: _slowness(split_axes(spec, dim))):
        axes = split_axes(spec, dim)
        if axes and jax.lax.axis_size(axes) > 1:  # over one, it would be a copy
            shard = jax.lax.all_gather(shard, axes, axis=dim, tiled=True)
    return shard


def _slowness(axes: tuple[str, ...]) -> int:
    """For gathers: over slow links first, while parts are small."""
    return min((DEVICE_ORDER.index(axis) for axis in axes), default=0)


def gather_varying(shard: jax.Array, spec: P, *, keep: int = 0) -> jax.Array:
    """`gather_over`, of a type that varies over the batch's axes.

    Its transpose reduces a gradient over all of them, once and wherever the parts are used: first
    scattered along `spec`, so that only a part is summed over the other axes.
    """
    return gather_over(vary(shard), spec, keep=keep)


def gather_narrow(shard: jax.Array, spec: P, dtype: jnp.dtype, *, keep: int = 0) -> jax.Array:
    """`gather_varying` of a parameter, float32 in training, which travels as `dtype`.

    What comes out is float32 again, of narrow values, so that its gradient is float32 from the
    product that makes it to its reduced parts. It is made to vary once, before it is used, so that
    this reduction is not made at each use.
    """
    gather = functools.partial(gather_varying, spec=spec, keep=keep)

    @jax.custom_vjp
    def gather_narrow(shard):
        if shard.dtype == jnp.float32:
            # A compiler that sees only narrow uses of all layers' parts would narrow them all, once
            # and before the loop over layers. It does not see through integers.
            bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(shard, jnp.uint32))
            shard = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return gather(shard.astype(dtype)).astype(jnp.float32)

    def backward(shard, gradient):
        return jax.vjp(gather, shard)[1](gradient)

    gather_narrow.defvjp(lambda shard: (gather_narrow(shard), shard), backward)
    return gather_narrow(shard)


def vary(x: jax.Array) -> jax.Array:
    """Inside a `shard_map`: x as a type that varies over the batch's axes.

    Its transpose sums a gradient over those over which x did not vary.
    """
    varying = jax.typeof(x).manual_axis_type.varying
    missing = tuple(axis for axis in BATCH_AXES if axis not in varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch [micro_batches, rows, length]: rows are split."""
    return NamedSharding(mesh, P(None, BATCH_AXES, None))


def process_share(mesh: Mesh) -> tuple[int, int, int]:
    """The rows that this process feeds: parts [first, last) out of `count` equal ones.

    Raises:
      ValueError: this process's devices do not hold neighbouring rows.
    """
    count = num_shards(dict(mesh.shape), BATCH_AXES)
    order = np.moveaxis(mesh.devices, [DEVICE_ORDER.index(axis) for axis in BATCH_AXES], range(4))
    mine = sorted(
        {
            part
            for part, devices in enumerate(order.reshape(count, -1))
            if any(device.process_index == jax.process_index() for device in devices)
        }
    )
    if mine != list(range(mine[0], mine[-1] + 1)):
        raise UserError(
            f"the devices of process {jax.process_index()} hold parts {mine} of the batch, which "
            "are not neighbours; change config.mesh so that each process's devices stand together"
        )
    return mine[0], mine[-1] + 1, count
