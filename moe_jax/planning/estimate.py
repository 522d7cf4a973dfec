"""How long a train step takes, as a roofline; what a run costs.

Products run at the rate of a device's units or of its memory, whichever takes longer. Gathers of
weights and sums of gradients hide under them as far as they last. Tokens on their way to experts
hide under the experts' products alone, and of the parts in which they travel the first never does
(`model.moe.exchange_parts`). Rates are the makers' times the shares below, which are assumptions
and may be set.
"""

import dataclasses
import math
from typing import NamedTuple

from moe_jax.planning import communication
from moe_jax.planning.case import PART_OF_GROUP, Case
from moe_jax.planning.communication import EXCHANGES, FLOAT32, Transfer
from moe_jax.planning.machines import Topology
from moe_jax.planning.operations import (
    count,
    forward_operations,
    recomputed_operations,
    training_operations,
)
from moe_jax.planning.weights import Weight


class Efficiency(NamedTuple):
    """Shares of the stated rates that programs reach."""

    products: float = 0.6
    memory: float = 0.8
    links: float = 0.7


class Part(NamedTuple):
    """Seconds of a step, by what bounds them."""

    operations: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of one device.

    parts: products by group, and the optimizer.
    transfers: with the seconds that each would take alone.
    needed: operations, none repeated.
    """

    tokens: int
    parts: dict[str, Part]
    transfers: list[tuple[Transfer, float]]
    needed: float
    rate: float
    exchange_parts: int

    @property
    def busy(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    @property
    def exchange(self) -> float:
        return sum(seconds for transfer, seconds in self.transfers if transfer.kind in EXCHANGES)

    @property
    def communication(self) -> float:
        return sum(seconds for _, seconds in self.transfers)

    @property
    def hidden_exchange(self) -> float:
        """Of its seconds, those under experts' products.

        A part hides under the routed experts' work on others. The last one's way back has only
        shared experts beside it, and the first one's way there nothing.
        """
        routed, shared = (
            self.parts[name].seconds if name in self.parts else 0.0 for name in ("routed", "shared")
        )
        last = self.exchange / 2 / self.exchange_parts
        return min(self.exchange - 2 * last, routed) + min(last, shared)

    @property
    def waiting(self) -> float:
        """For links, at best."""
        others, room = self.communication - self.exchange, self.busy - self.hidden_exchange
        return self.exchange - self.hidden_exchange + max(0.0, others - room)

    @property
    def seconds(self) -> float:
        return self.busy + self.waiting

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Operations that the model needs over what the device could do."""
        return self.needed / self.seconds / self.rate


def step(
    case: Case, topology: Topology, efficiency: Efficiency, document: int | None = None
) -> Step:
    """What a step of this case takes on one of these devices.

    Args:
      document: tokens of a document, where rows hold several that are masked from one another.
    """
    config, machine = case.config, topology.machine
    model, length = config.model, attended(case, document)
    parameters = count(case.weights, model)
    tokens = case.tokens * case.micro_batches
    rate = machine.rate(config.precision.compute_dtype)
    operations = {
        group: 3 * number for group, number in forward_operations(model, parameters, length).items()
    }
    again = recomputed_operations(
        model,
        case.weights,
        length,
        config.training.rematerialization,
        case.platform,
        case.parts,
        fp8=case.fp8,
    )
    for group, number in again.items():
        operations[group] = operations.get(group, 0.0) + number
    moved = product_bytes(case)
    bandwidth = machine.memory_bandwidth * efficiency.memory
    narrow = machine.rate("float8")

    def seconds(group: str, number: float) -> float:
        part = PART_OF_GROUP.get(group)
        fast = narrow if part and case.in_fp8(part) else rate
        return tokens * number / fast / efficiency.products

    parts = {
        group: Part(seconds(group, number), moved.get(group, 0.0) / bandwidth)
        for group, number in operations.items()
        if number
    }
    trained = sum(weight.part(case.sizes) for weight in case.weights if weight.trained)
    # AdamW reads a parameter, its gradient and two moments, and writes all but the gradient.
    updated = 3 * FLOAT32 + 4 * case.moment_bytes
    averages = 2 * FLOAT32 if config.optimizer.ema_decay else 0
    parts["optimizer"] = Part(0.0, trained * (updated + averages) / bandwidth)
    timed = [
        (t, communication.seconds(t, case.sizes, topology) / efficiency.links)
        for t in communication.transfers(case)
    ]
    needed = training_operations(model, parameters, length) * tokens
    return Step(tokens, parts, timed, needed, rate, case.parts)


def attended(case: Case, document: int | None) -> int:
    """The tokens among which attention looks: of a row, or of a document where these are masked."""
    documents = case.config.data.mask_documents and document
    return min(case.length, documents or case.length)


def product_bytes(case: Case) -> dict[str, float]:
    """What products read from memory and write to it in a step, by group.

    Each reads a weight and rows and writes rows; three times with those of the backward pass, and
    once more where the forward one is repeated. A weight's gradient is float32 and is added up.
    """
    passes = 3 if case.config.training.rematerialization == "none" else 4
    moved: dict[str, float] = {}
    for weight in case.weights:
        if weight.group in ("other", "embedding"):
            continue
        whole = weight.gathered(case.sizes)
        rows = float(case.tokens)
        if weight.group == "routed":
            rows *= case.config.model.moe.num_experts_per_tok
        group = "mtp" if weight.stack == "mtp" else weight.group
        size = case.operand_bytes(PART_OF_GROUP.get(group))
        activations = passes * rows * weight.layers * _row_bytes(weight, size, case.compute_bytes)
        weights = passes * whole * size + 2 * whole * FLOAT32
        moved[group] = moved.get(group, 0.0) + (activations + weights) * case.micro_batches
    return moved


def _row_bytes(weight: Weight, operand: float, result: float) -> float:
    """Of a row that a product reads and of what it makes of it."""
    inputs, outputs = _dims(weight)
    return inputs * operand + outputs * result


def _dims(weight: Weight) -> tuple[int, int]:
    """Rows and columns of a layer's matrix, or of an expert's."""
    dims = weight.shape[1:] if weight.stack else weight.shape
    if weight.group == "routed":
        dims = dims[1:]
    inner = 2 if "output" in weight.path else 1
    return math.prod(dims[:inner]), math.prod(dims[inner:])
