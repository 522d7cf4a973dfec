"""All figures of a plan as one tree of numbers, which JSON, text and page show."""

import dataclasses
import math
from typing import Any

from moe_jax import curriculum
from moe_jax.config import Config, UserError
from moe_jax.planning import communication
from moe_jax.planning.case import Case
from moe_jax.planning.estimate import Efficiency, Step, attended, step
from moe_jax.planning.machines import Topology
from moe_jax.planning.memory import USABLE, cache_per_token, memory
from moe_jax.planning.operations import (
    count,
    dense_operations,
    forward_operations,
    recomputed_operations,
    training_operations,
)
from moe_jax.planning.search import flags, search, smallest


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked besides config and topology.

    tokens: of the whole run; None: as the config has it.
    price: of a device-hour, in any currency; None: not asked.
    document: tokens of a document, where a row holds several.
    context: tokens in the cache, for serving; None: not asked.
    """

    tokens: float | None = None
    price: float | None = None
    document: int | None = None
    context: int | None = None
    efficiency: Efficiency = Efficiency()

    def check(self) -> None:
        """Raises UserError where a number cannot be."""
        for name, share in self.efficiency._asdict().items():
            if not 0 < share <= 1:
                raise UserError(f"--{name}={share:g} is a share and must be above 0, and at most 1")
        numbers = {"tokens": self.tokens, "document_length": self.document, "context": self.context}
        for name, value in numbers.items():
            if value is not None and not 1 <= value < math.inf:
                raise UserError(f"--{name}={value:g} must be a number from 1 on")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UserError(f"--price={self.price:g} must be a number from 0 on")


def of_model(case: Case, question: Question) -> dict[str, Any]:
    """What no machine changes."""
    config, model = case.config, case.config.model
    parameters, length = count(case.weights, model), attended(case, question.document)
    forward = forward_operations(model, parameters, length)
    again = recomputed_operations(
        model,
        case.weights,
        length,
        config.training.rematerialization,
        case.platform,
        case.parts,
        fp8=case.fp8,
    )
    return {
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "mtp": parameters.mtp,
            "by_group": parameters.by_group,
        },
        "flops_per_token": {
            "forward": sum(forward.values()),
            "training": training_operations(model, parameters, length),
            "by_group": forward,
            "six_n": 6.0 * parameters.active,
            "dense_model": dense_operations(model, parameters, length),
            "recomputed": sum(again.values()),
            "recomputed_by_group": again,
        },
        "attended_tokens": length,
        "cache_bytes_per_token": cache_per_token(model, case.compute_bytes),
    }


def of_run(case: Case, topology: Topology, question: Question) -> dict[str, Any]:
    """What the machine does with it."""
    by_kind, machine = memory(case), topology.machine
    its_step = step(case, topology, question.efficiency, question.document)
    total = sum(by_kind.values())
    return {
        "topology": topology.name,
        "devices": topology.devices,
        "mesh": {axis: size for axis, size in case.sizes.items() if size > 1},
        "batch": _batch(case),
        "memory_per_device": {
            "total": total,
            "by_kind": by_kind,
            "capacity": machine.memory,
            "fits": total <= USABLE * machine.memory,
        },
        "communication_per_step": _communication(case, topology, its_step),
        "seconds_by_part": _seconds_by_part(its_step),
        "waiting_seconds": its_step.waiting,
        "waiting_for_exchange_seconds": its_step.exchange - its_step.hidden_exchange,
        "step_seconds": its_step.seconds,
        "tokens_per_second_per_device": its_step.tokens_per_second,
        "mfu": its_step.mfu,
        "rates": {
            "operations": its_step.rate,
            "memory": machine.memory_bandwidth,
            "fast_links": machine.fast_links,
            "slow_links": machine.slow_links,
        },
        "efficiency": question.efficiency._asdict(),
        **_whole_run(case.config, topology, its_step, question),
    }


def of_search(case: Case, topology: Topology, question: Question) -> dict[str, Any]:
    """Ways that fit, the fastest first; if none does, the one that comes nearest."""
    ways = search(case, topology, question.efficiency, question.document)
    found: dict[str, Any] = {
        "alternatives": [
            _way(way.case, way.memory) | {"step_seconds": way.step.seconds, "mfu": way.step.mfu}
            for way in ways
        ]
    }
    if not ways and (nearest := smallest(case, topology)):
        found["nearest"] = _way(*nearest)
    return found


def _way(case: Case, needed: float) -> dict[str, Any]:
    return {"mesh": case.mesh, "memory": needed, "flags": flags(case.config)}


def _batch(case: Case) -> dict[str, Any]:
    training = case.config.training
    return {
        "tokens_per_step": curriculum.tokens_per_step(case.config, case.stage),
        "micro_batches": case.micro_batches,
        "rows_per_device": case.rows,
        "sequence_length": case.length,
        "rematerialization": training.rematerialization,
        "exchange_parts": case.parts,
    }


def _communication(case: Case, topology: Topology, its_step: Step) -> dict[str, Any]:
    by_kind: dict[str, float] = {}
    transfers = []
    for transfer, seconds in its_step.transfers:
        by_kind[transfer.kind] = by_kind.get(transfer.kind, 0.0) + transfer.bytes
        links = communication.links(transfer, case.sizes, topology)
        transfers.append(transfer._asdict() | links._asdict() | {"seconds": seconds})
    return {"total": sum(by_kind.values()), "by_kind": by_kind, "transfers": transfers}


def _seconds_by_part(its_step: Step) -> dict[str, float]:
    """Each as if alone."""
    seconds = {name: part.seconds for name, part in its_step.parts.items()}
    for transfer, alone in its_step.transfers:
        seconds[transfer.kind] = seconds.get(transfer.kind, 0.0) + alone
    return seconds


def _whole_run(
    config: Config, topology: Topology, its_step: Step, question: Question
) -> dict[str, Any]:
    tokens = int(question.tokens or 0) or curriculum.tokens_after(config, config.training.num_steps)
    hours = tokens / its_step.tokens_per_second / 3600
    price, watts = question.price, topology.machine.watts
    return {
        "tokens": tokens,
        "device_hours": hours,
        "days": hours / topology.devices / 24,
        "price_per_device_hour": price,
        "cost": None if price is None else price * hours,
        "energy_kwh": None if watts is None else watts * hours / 1000,
    }
