"""Meshes, rematerialization and micro-batches under which a run fits, the fastest first."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax import validation
from moe_jax.config import Config, MeshConfig, UserError
from moe_jax.curriculum import num_rows
from moe_jax.planning.case import Case
from moe_jax.planning.estimate import Efficiency, Step, step
from moe_jax.planning.machines import Topology
from moe_jax.planning.memory import USABLE, memory
from moe_jax.sharding import BATCH_AXES

# From what keeps most to what keeps least.
POLICIES = ("none", "minimal", "latent", "full")


class Found(NamedTuple):
    """A way to run it that fits."""

    case: Case
    step: Step
    memory: float


def flags(config: Config) -> list[str]:
    """What to add to the command."""
    fields = {f"mesh.{axis}": getattr(config.mesh, axis) for axis in BATCH_AXES} | {
        "training.micro_batches": config.training.micro_batches,
        "training.rematerialization": config.training.rematerialization,
    }
    return [f"--config.{name}={value}" for name, value in fields.items()]


def search(
    case: Case, topology: Topology, efficiency: Efficiency, document: int | None, most: int = 5
) -> list[Found]:
    """The fastest of each mesh that fits, of at most so many meshes.

    Nothing else of the config changes.
    """
    timed = [
        (step(candidate, topology, efficiency, document), candidate)
        for candidate in candidates(case, topology)
    ]
    found: dict[MeshConfig, Found] = {}
    too_large: list[Case] = []
    for its_step, candidate in sorted(timed, key=lambda pair: pair[0].seconds):
        mesh = candidate.config.mesh
        if mesh in found or any(_needs_no_less(candidate, other) for other in too_large):
            continue
        needed = sum(memory(candidate).values())
        if needed <= USABLE * topology.machine.memory:
            found[mesh] = Found(candidate, its_step, needed)
            if len(found) == most:
                break
        else:
            too_large.append(candidate)
    return list(found.values())


def smallest(case: Case, topology: Topology) -> tuple[Case, float] | None:
    """The way that takes the least memory, and its bytes; None where the batch cannot be split."""
    needed = [(c, sum(memory(c).values())) for c in candidates(case, topology)]
    return min(needed, key=lambda way: way[1], default=None)


def candidates(case: Case, topology: Topology) -> Iterator[Case]:
    """All meshes that the devices, the experts and the batch allow, with all that may go with each.

    Experts are split in two levels where they reach beyond what fast links join.
    """
    config = case.config
    experts = config.model.moe.num_experts if case.routed_layers else 1
    rows = num_rows(config, case.stage)
    if rows % case.devices:
        return
    for expert_devices in _divisors(math.gcd(experts, case.devices)):
        inner = math.gcd(expert_devices, topology.domain)
        for outer_levels in {(1, expert_devices), (expert_devices // inner, inner)}:
            for fsdp in _divisors(case.devices // expert_devices):
                mesh = MeshConfig(
                    num_cpu_devices=config.mesh.num_cpu_devices,
                    data=case.devices // expert_devices // fsdp,
                    fsdp=fsdp,
                    expert_outer=outer_levels[0],
                    expert=outer_levels[1],
                )
                for micro_batches in _divisors(rows // case.devices):
                    ways = [_changed(case, config, mesh, micro_batches, p) for p in POLICIES]
                    if _runs(ways[0]):
                        yield from ways


def _runs(case: Case) -> bool:
    """Whether training takes it: rows of all stages, experts, the parts that tokens travel in."""
    try:
        validation.check_mesh(case.config, case.sizes, case.platform)
    except UserError:
        return False
    return True


def _changed(case: Case, config: Config, mesh: MeshConfig, micro_batches: int, policy: str) -> Case:
    training = dataclasses.replace(
        config.training, micro_batches=micro_batches, rematerialization=policy
    )
    return case.with_config(dataclasses.replace(config, mesh=mesh, training=training))


def _needs_no_less(candidate: Case, other: Case) -> bool:
    """Whether it is `other` with no fewer rows at once, of which it keeps no less."""
    policies = [POLICIES.index(c.config.training.rematerialization) for c in (candidate, other)]
    return (
        candidate.config.mesh == other.config.mesh
        and candidate.rows >= other.rows
        and policies[0] <= policies[1]
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
