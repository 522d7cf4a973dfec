"""Every weight of a model: its shape, the group it belongs to, and how a mesh splits it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from moe_jax import sharding
from moe_jax.config import MESH_AXES, ModelConfig
from moe_jax.models.language_model import abstract_weights

# "other": norms and router biases, which take part in no product.
GROUPS = ("embedding", "attention", "dense", "shared", "routed", "router", "head", "other")
STACKS = ("dense_blocks", "moe_blocks", "mtp")


class Weight(NamedTuple):
    """A weight, of all the layers of its stack.

    path: names in the tree of parameters, as ("moe_blocks", "attention", "query_up", "weight").
    shape: with a leading dim of layers in a stack.
    axes: of each dim, the mesh axes that split it as far as they divide it.
    trained: False for router biases, which have no gradient.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    trained: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stack(self) -> str | None:
        """The stack of layers that it is in."""
        return self.path[0] if self.path[0] in STACKS else None

    @property
    def layers(self) -> int:
        return self.shape[0] if self.stack else 1

    @property
    def group(self) -> str:
        """Of `GROUPS`."""
        if not self.trained or "scale" in self.path:
            return "other"
        for group in ("embedding", "attention", "shared", "router", "head"):
            if group in self.path:
                return group
        return "routed" if "moe" in self.path else "dense"

    def split_over(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh of these sizes that split it."""
        return tuple(
            axis
            for size, axes in zip(self.shape, self.axes, strict=True)
            for axis in sharding.dividing(size, axes, dict(sizes))
        )

    def gathered_over(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Those over which its parts come together for a product: experts stay apart."""
        apart = sharding.EXPERT_AXES if self.group == "routed" else ()
        return tuple(axis for axis in self.split_over(sizes) if axis not in apart)

    def gathered(self, sizes: Mapping[str, int]) -> int:
        """Its size on a device that has gathered it."""
        return self.part(sizes) * sharding.num_shards(dict(sizes), self.gathered_over(sizes))

    def part(self, sizes: Mapping[str, int]) -> int:
        """Its size on one device of the mesh; parts are equal."""
        return self.size // sharding.num_shards(dict(sizes), self.split_over(sizes))


def weights_of(config: ModelConfig) -> list[Weight]:
    """Of a model that need not be here, traced on a mesh of one device, which divides any dim."""
    mesh = sharding.abstract_mesh(dict.fromkeys(MESH_AXES, 1))
    return listed(*abstract_weights(config, mesh))


def listed(parameters: Any, router_bias: Any) -> list[Weight]:
    """Of trees of arrays or of their shapes."""

    def weight(path: tuple, x: Any, trained: bool) -> Weight:
        dims = range(len(x.shape))
        spec = getattr(x.sharding, "spec", sharding.P())
        axes = tuple(sharding.split_axes(spec, dim) for dim in dims)
        return Weight(tuple(str(key.key) for key in path), tuple(x.shape), axes, trained)

    return [
        weight(path, x, trained)
        for tree, trained in ((parameters, True), (router_bias, False))
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
