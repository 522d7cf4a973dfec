"""Arrays that are read in parts, where they are needed: the common form of all checkpoints."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from moe_jax.ops.fp8_weight import Fp8Weight
from moe_jax.sharding import P

Tree = Any  # nested dicts
Index = tuple[slice, ...]

# What is read at once, unless one tensor of a file is larger.
PIECE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array of `shape` and `dtype`; `read(index)` gives the part at a slice per dim.

    A leaf of a tree.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LazyFp8:
    """The same of a weight that stays in eight bits: the parts of an `Fp8Weight`."""

    values: Lazy
    scales: Lazy
    num_in_dims: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def from_array(array: jax.Array) -> Lazy:
    """Of an array on this process's devices."""
    return Lazy(array.shape, np.dtype(array.dtype), lambda index: np.asarray(array[index]))


def whole(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, size) for size in shape)


def bounds(index: Index, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Start and stop of each dim; steps other than 1 are not asked for."""
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]


def piece_shape(shape: tuple[int, ...], itemsize: int, limit: int = PIECE_BYTES) -> list[int]:
    """The largest part of at most `limit` bytes, where rows allow it.

    Leading dims are 1 as far as that is needed, the next one is a run, and the rest are whole.
    """
    result = list(shape)
    for dim in range(len(shape)):
        rest = math.prod(shape[dim + 1 :]) * itemsize
        if rest * shape[dim] <= limit:
            break
        result[dim] = max(1, limit // max(1, rest))
        if rest <= limit:
            break
    return result


def pieces(shape: tuple[int, ...], itemsize: int, limit: int = PIECE_BYTES) -> Iterator[Index]:
    """Indices that cover an array in parts of `piece_shape`."""
    runs = [
        [slice(start, min(start + run, size)) for start in range(0, size, run)]
        for size, run in zip(shape, piece_shape(shape, itemsize, limit), strict=True)
    ]
    yield from itertools.product(*runs)


def place(lazy: Lazy, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The array on the devices of `like.sharding`; each reads its own part, in pieces."""
    assert lazy.shape == like.shape, (lazy.shape, like.shape)

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        corners = bounds(index, lazy.shape)
        shape = tuple(stop - start for start, stop in corners)
        result = np.empty(shape, like.dtype)
        for piece in pieces(shape, lazy.dtype.itemsize):
            moved = tuple(
                slice(start + s.start, start + s.stop)
                for (start, _), s in zip(corners, piece, strict=True)
            )
            result[piece] = lazy.read(moved).astype(like.dtype)
        return result

    assert like.sharding is not None
    return jax.make_array_from_callback(lazy.shape, like.sharding, part)


def place_fp8(lazy: LazyFp8, like: jax.ShapeDtypeStruct) -> Fp8Weight:
    """Read as `like.dtype`. A device has the scales of its layers and experts."""
    assert isinstance(like.sharding, NamedSharding)
    leading = len(lazy.scales.shape) - 2
    by_leading = NamedSharding(like.sharding.mesh, P(*like.sharding.spec[:leading]))
    parts = (lazy.values, like.sharding), (lazy.scales, by_leading)
    values, scales = (
        place(part, jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding))
        for part, sharding in parts
    )
    return Fp8Weight(values, scales, lazy.num_in_dims, jnp.dtype(like.dtype))


def flatten(tree: Tree) -> dict[tuple[str, ...], Any]:
    """Leaves by their path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten(leaves: dict[tuple[str, ...], Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree
