"""A compiled train step: what it needs of one device, beside what was planned.

Memory is the compiler's own analysis; operations, bytes and collectives are counted by a walk over
its text (`compiled.py`), routing balanced and in its first round.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from moe_jax import curriculum, sharding
from moe_jax.config import Config
from moe_jax.ops import attention_gpu
from moe_jax.planning.compiled import Counts, Kernel, Walk
from moe_jax.planning.hlo import Array
from moe_jax.units import format_bytes

# A compiled figure that is more than so many times the planned one is explained.
EXCESS = 1.1


class TooLarge(Exception):
    """A program needs more memory than a device has; both in bytes."""

    def __init__(self, needed: float, available: float):
        super().__init__(f"the program needs {needed:.4g} bytes of {available:.4g}")
        self.needed, self.available = needed, available

    def figures(self) -> dict[str, Any]:
        """What a plan says in place of a compiled step's figures."""
        return {"memory_per_device": {"total": self.needed, "available": self.available}}


class CompiledStep(NamedTuple):
    """A program and what it needs of one device.

    text: with the schedule.
    state: shapes and shardings of what it updates in place.
    state_bytes, temporary_bytes: by the compiler's own analysis; the batch is in the first.
    seconds: that compiling took.
    """

    text: str
    mesh: Mesh
    state: Any
    state_bytes: int
    temporary_bytes: int
    seconds: float


def walk(step: CompiledStep, config: Config) -> Walk:
    """Through the program, routing balanced and in its first round."""
    # What a step's buffers hold beyond a balanced load, kernels leave out.
    filled = 1 / config.model.moe.buffer_factor
    kernels = grouped_kernels(filled) | fp8_kernels(filled)
    if "NVIDIA" in step.mesh.devices.flat[0].device_kind:
        # Programs for GPU do not carry what a kernel's author declares.
        kernels |= ATTENTION_KERNELS
    return Walk(step.text, _expected_trips(step, config), kernels)


def _expected_trips(step: CompiledStep, config: Config) -> dict[str, float]:
    """Of the portable loops over experts, by op_name: every expert with the same load."""
    trips: dict[str, float] = {r"further_rounds\)*/cond/branch_1_fun/while$": 0}
    sizes = sorted(map(int, set(re.findall(r"/pieces_of_(\d+)/", step.text))), reverse=True)
    if not sizes:
        return trips
    moe, shape = config.model.moe, step.mesh.shape
    stage = curriculum.main_stage(config)
    of_all = curriculum.tokens_per_step(config, stage)
    tokens = (
        of_all
        // curriculum.micro_batches(config, stage)
        // math.prod(shape[axis] for axis in sharding.BATCH_AXES)
    )
    devices = math.prod(shape[axis] for axis in sharding.EXPERT_AXES)
    parts = moe.exchange_parts if devices > 1 else 1
    load = tokens * devices * moe.num_experts_per_tok / moe.num_experts / parts
    left = math.ceil(load / sizes[-1]) * sizes[-1]
    for size in sizes:
        trips[f"/pieces_of_{size}/while$"], left = divmod(left, size)
    return trips


def grouped_kernels(filled: float) -> dict[str, Kernel]:
    """Of the experts' products, whose buffers are filled so far with tiles."""

    def weights(operands: tuple[Array, ...], results: tuple[Array, ...]) -> float:
        rows = next(x.dims[0] for x in operands if len(x.dims) == 2)
        return 2.0 * filled * rows * math.prod(results[0].dims[1:])

    def rows(operands: tuple[Array, ...], results: tuple[Array, ...]) -> float:
        rows, width = results[0].dims
        inner = next(x.dims[1] for x in operands if len(x.dims) == 2 and x.dims[0] == rows)
        return 2.0 * filled * rows * inner * width

    return {"grouped_matmul_weights": weights, "grouped_matmul": rows}


def fp8_kernels(filled: float) -> dict[str, Kernel]:
    """Of products in eight bits: the experts' in buffers, and others, which all rows fill.

    What a kernel pads, it multiplies.
    """

    def of_buffers(filled: float) -> tuple[Kernel, Kernel]:
        def weights(operands: tuple[Array, ...], results: tuple[Array, ...]) -> float:
            return 2.0 * filled * _narrow(operands)[1] * math.prod(results[0].dims[1:])

        def rows(operands: tuple[Array, ...], results: tuple[Array, ...]) -> float:
            return 2.0 * filled * math.prod(_narrow(operands)) * results[0].dims[1]

        return weights, rows

    (weights, rows), (dense_weights, dense) = of_buffers(filled), of_buffers(1.0)
    return {
        "dispatch.*matmul_fp8_weights": weights,
        "dispatch.*matmul_fp8": rows,
        "matmul_fp8_weights": dense_weights,
        "matmul_fp8": dense,
    }


def _narrow(operands: tuple[Array, ...]) -> tuple[int, ...]:
    """The dims of the first operand in eight bits: [slots, summed], of weights [rows, slots]."""
    return next(x.dims for x in operands if x.dtype.startswith("f8"))


def _attention(of_queries: int, of_values: int) -> Kernel:
    """So many products over the dim of queries, and of values, of the blocks causality leaves."""

    def operations(operands: tuple[Array, ...], results: tuple[Array, ...]) -> float:
        query, _, value = [x.dims for x in operands if len(x.dims) == 4][:3]
        rows, length, heads, width = query
        pairs = rows * heads * length * (length + attention_gpu.BLOCK) / 2
        return 2.0 * pairs * (of_queries * width + of_values * value[3])

    return operations


ATTENTION_KERNELS: dict[str, Kernel] = {
    "attention_backward_dq": _attention(2, 1),
    "attention_backward_dkv": _attention(2, 2),
    "attention_forward": _attention(1, 1),
}


def figures(step: CompiledStep, config: Config) -> dict[str, Any]:
    """For the plan's JSON; bytes and operations of one device in a step."""
    counts = walk(step, config).counts()
    kinds: dict[str, dict[str, float]] = {}
    for collective in counts.collectives:
        if collective.times:
            of_kind = kinds.setdefault(collective.kind, {"count": 0.0, "bytes": 0.0})
            of_kind["count"] += collective.times
            of_kind["bytes"] += collective.bytes * collective.times
    return {
        "memory_per_device": {
            "total": step.state_bytes + step.temporary_bytes,
            "state": step.state_bytes,
            "temporaries": step.temporary_bytes,
        },
        "flops": counts.operations,
        "bytes_accessed": counts.product_bytes,
        "collectives": kinds,
        "flops_by_scope": by_scope(counts),
        "not_counted": sorted(set(counts.not_counted)),
        "compile_seconds": step.seconds,
    }


def by_scope(counts: Counts) -> dict[str, float]:
    """Operations by the model's named scopes, forward and backward apart, the largest first."""
    total: dict[str, float] = {}
    for product in counts.products:
        names = re.findall(r"[A-Za-z_]\w*", product.op_name)
        way = "backward" if "transpose" in names else "forward"
        if "rematted_computation" in names:
            way = "again"
        scopes = [name for name in names if name in SCOPES]
        key = " ".join([*dict.fromkeys(scopes), way])
        total[key] = total.get(key, 0.0) + (product.operations or 0.0) * product.times
    return dict(sorted(total.items(), key=lambda item: -item[1]))


# Named scopes of `models/decoder.py`, `models/block.py` and `layers/moe.py`.
SCOPES = (
    *("embedding", "dense_layers", "moe_layers", "multi_token_prediction", "loss"),
    *("attention", "mlp", "router", "dispatch", "shared_experts"),
)


def lines(compiled: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[str]:
    """For a person, each beside the plan's own count."""
    memory, capacity = compiled["memory_per_device"], plan["memory_per_device"]["capacity"]
    available = memory.get("available", capacity)
    if memory["total"] > available:
        total, over = memory["total"], memory["total"] - available
        planned = format_bytes(plan["memory_per_device"]["total"])
        yield f"compiled    does not fit: {format_bytes(total)} on a device; planned {planned}"
        yield f"            {format_bytes(over)} more than there are"
    if "flops" in compiled:
        yield from _beside_the_plan(compiled, plan)
    if compiled["largest"]:
        yield "largest buffers:"
    for buffer in compiled["largest"]:
        yield f"  {format_bytes(buffer['bytes']):>10}  {buffer['shape']}"
        if buffer["op_name"]:
            yield f"{'':14}{buffer['op_name'][-66:]}"


def _beside_the_plan(compiled: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[str]:
    memory, planned = compiled["memory_per_device"], plan["memory_per_device"]["by_kind"]
    state = sum(planned[kind] for kind in ("parameters", "optimizer", "moving average"))
    operations = _planned_operations(plan)
    head = f"compiled    in {compiled['compile_seconds']:,.0f} s"
    yield f"{head:<36}{'compiled':>12}{'planned':>12}"
    yield _beside("operations", compiled["flops"], operations, lambda x: f"{x / 1e12:,.4g} T")
    yield _beside("state", memory["state"], state, format_bytes)
    temporaries = plan["memory_per_device"]["total"] - state
    yield _beside("temporaries", memory["temporaries"], temporaries, format_bytes)
    sent = sum(kind["bytes"] for kind in compiled["collectives"].values())
    yield _beside("sent", sent, plan["communication_per_step"]["total"], format_bytes)
    for kind, of_kind in sorted(compiled["collectives"].items()):
        yield f"    {kind:<32}{format_bytes(of_kind['bytes']):>12} in {of_kind['count']:,.0f}"
    if compiled["flops"] > EXCESS * operations:
        yield f"more operations than planned by over {EXCESS - 1:.0%}; the most are of:"
        for scope, number in list(compiled["flops_by_scope"].items())[:8]:
            yield f"    {scope:<32}{number / 1e12:>10,.4g} T"
    for kernel in compiled["not_counted"]:
        yield f"not counted, since its author declares nothing: {kernel}"


def _planned_operations(plan: Mapping[str, Any]) -> float:
    """Of a device in a step, with those that are repeated."""
    per_token = plan["flops_per_token"]["training"] + plan["flops_per_token"]["recomputed"]
    return per_token * plan["batch"]["tokens_per_step"] / plan["devices"]


def _beside(name: str, compiled: float, planned: float, form: Any) -> str:
    ratio = f"{compiled / planned:8.2f}x" if planned else ""
    return f"  {name:<34}{form(compiled):>12}{form(planned):>12}{ratio}"
