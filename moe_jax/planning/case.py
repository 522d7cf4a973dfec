"""What is planned: a config on a mesh of devices that need not be here."""

import dataclasses
import functools
import math

import jax.numpy as jnp

from moe_jax import curriculum, sharding, validation
from moe_jax.config import MESH_AXES, Config, MeshConfig, Stage
from moe_jax.ops.fp8 import TILE
from moe_jax.planning.weights import Weight, weights_of
from moe_jax.sharding import BATCH_AXES

FLOAT32 = 4
# The recipe's part that a group's products belong to; others stay as they are.
PART_OF_GROUP = {"attention": "attention", "dense": "mlp", "shared": "mlp", "routed": "experts"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on so many devices of a platform.

    weights: `weights_of` the config's model, counted once for many meshes.
    """

    config: Config
    devices: int
    platform: str  # "cpu", "gpu" or "tpu"
    weights: tuple[Weight, ...]

    @classmethod
    def of(cls, config: Config, devices: int, platform: str = "cpu") -> "Case":
        """Checked as a run of it would be.

        Raises:
          UserError: the mesh does not fit the devices, or the batch or the experts the mesh.
        """
        case = cls(config, devices, platform, tuple(weights_of(config.model)))
        validation.check_mesh(config, case.sizes, platform)
        return case

    @classmethod
    def without_mesh(cls, config: Config) -> "Case":
        """On one device, for what no mesh changes."""
        alone = dataclasses.replace(config, mesh=MeshConfig())
        return cls(alone, 1, "cpu", tuple(weights_of(config.model)))

    def with_config(self, config: Config) -> "Case":
        """Another mesh or training of the same model."""
        return dataclasses.replace(self, config=config)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Of all mesh axes."""
        return sharding.mesh_sizes(self.config.mesh, self.devices)

    @property
    def mesh(self) -> str:
        """For a person: "fsdp 32, expert 64"."""
        split = [axis for axis in MESH_AXES if self.sizes[axis] > 1]
        return ", ".join(f"{axis} {self.sizes[axis]}" for axis in split) or "of one"

    @functools.cached_property
    def stage(self) -> Stage:
        """The one that is planned: that which sees the most tokens."""
        return curriculum.main_stage(self.config)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.stage.sequence_length

    @property
    def rows(self) -> int:
        """Of a device in a micro-batch."""
        rows = curriculum.num_rows(self.config, self.stage)
        parts = self.micro_batches * math.prod(self.sizes[a] for a in BATCH_AXES)
        return rows // parts

    @property
    def tokens(self) -> int:
        """Of a device in a micro-batch."""
        return self.rows * self.length

    @property
    def micro_batches(self) -> int:
        return curriculum.micro_batches(self.config, self.stage)

    @property
    def parts(self) -> int:
        """In which a micro-batch's tokens travel to their experts."""
        split = self.sizes["expert_outer"] * self.sizes["expert"] > 1
        return self.config.model.moe.exchange_parts if split else 1

    @property
    def compute_bytes(self) -> int:
        """Of an activation, and of a weight on its way to a product."""
        return jnp.dtype(self.config.precision.compute_dtype).itemsize

    @property
    def combine_bytes(self) -> int:
        """Of an expert's result on its way back."""
        return jnp.dtype(self.config.precision.combine_dtype).itemsize

    @property
    def moment_bytes(self) -> int:
        """Of each of the optimizer's two moments of a parameter."""
        return jnp.dtype(self.config.optimizer.moments_dtype).itemsize

    @property
    def fp8(self) -> bool:
        """Whether there is a recipe."""
        return self.config.precision.recipe != "none"

    def in_fp8(self, part: str) -> bool:
        """Whether a recipe covers this part of the model, of `config.FP8_PARTS`."""
        return self.config.precision.recipe_of(part) != "none"

    def row_bytes(self, itemsize: int) -> int:
        """Of a vector on its way to experts, whose numbers have `itemsize` without a recipe."""
        dim = self.config.model.hidden_size
        return dim + -(-dim // TILE) if self.in_fp8("dispatch") else dim * itemsize

    def operand_bytes(self, part: str | None) -> float:
        """Of a number in a product of this part, the scales of tiles counted."""
        return 1 + FLOAT32 / TILE if part and self.in_fp8(part) else self.compute_bytes

    @property
    def dense_layers(self) -> int:
        return self.config.model.first_k_dense_replace

    @property
    def routed_layers(self) -> int:
        """Of the main model."""
        return self.config.model.num_hidden_layers - self.dense_layers

    @property
    def depth(self) -> int:
        """Of multi-token prediction, whose layers are of the kind of the last."""
        return self.config.model.num_nextn_predict_layers
