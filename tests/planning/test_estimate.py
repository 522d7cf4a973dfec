"""The roofline and the search, against sums by hand and their own definitions."""

import dataclasses

import pytest
from compiled_steps import case_of, make_config

from moe_jax import validation
from moe_jax.planning import memory
from moe_jax.planning.case import Case
from moe_jax.planning.estimate import Efficiency, Step, product_bytes, step
from moe_jax.planning.machines import Machine, Topology
from moe_jax.planning.operations import count, recomputed_operations, training_operations
from moe_jax.planning.search import candidates, flags, search, smallest

FULL = Efficiency(1.0, 1.0, 1.0)
MACHINE = Machine("test", {"bfloat16": 1e12, "float32": 1e12}, 1e9, 1e30, 1e30, fast_domain=8)


def topology(devices: int = 8, **changes: float) -> Topology:
    return Topology(MACHINE._replace(**changes), devices, min(devices, 8), f"test:{devices}")


def case(**mesh: int) -> Case:
    return case_of(make_config(2, 2, "latent", depth=1, **mesh))


def test_with_endless_memory_and_links_only_operations_take_time() -> None:
    planned = case(fsdp=2, expert=4)
    its_step = step(planned, topology(), FULL)
    model, length = planned.config.model, planned.length
    needed = training_operations(model, count(planned.weights, model), length)
    again = recomputed_operations(model, planned.weights, length, "latent", "cpu")
    tokens = 2 * 2 * length
    assert its_step.tokens == tokens
    assert its_step.seconds == pytest.approx((needed + sum(again.values())) * tokens / 1e12)
    assert its_step.mfu == pytest.approx(needed / (needed + sum(again.values())))
    halved = step(planned, topology(), FULL._replace(products=0.5))
    assert halved.seconds == pytest.approx(2 * its_step.seconds)


def test_with_slow_memory_the_time_is_that_of_its_bytes() -> None:
    planned = case(fsdp=8)
    its_step = step(planned, topology(memory_bandwidth=1.0), FULL)
    optimizer = sum(w.part(planned.sizes) for w in planned.weights if w.trained) * 4 * (7 + 2)
    scores = its_step.parts["scores"].seconds
    wanted = sum(product_bytes(planned).values()) + optimizer + scores
    assert its_step.busy == pytest.approx(wanted)


def test_bytes_of_a_product_by_hand() -> None:
    """The head, [64, 96]: 128 tokens come and go in three passes and one more; two gradients."""
    moved = product_bytes(case(fsdp=8))["head"]
    assert moved == 2 * (4 * (128 * (64 + 96) + 64 * 96) * 4 + 2 * 64 * 96 * 4)


def test_what_waits_for_links() -> None:
    planned = case(fsdp=2, expert=4)
    quick = step(planned, topology(), FULL)
    assert quick.waiting < 1e-9
    slow = step(planned, topology(fast_links=1e3), FULL)
    assert slow.exchange > slow.busy
    # All that travels takes its time, but for what hides under products.
    seen = slow.exchange - slow.parts["shared"].seconds
    assert slow.seconds == pytest.approx(max(slow.communication, slow.busy + seen))
    # In two parts, one travels while experts work on the other.
    ample = step(planned, topology(fast_links=1e12), FULL)
    assert ample.hidden_exchange == pytest.approx(ample.exchange / 2) != 0
    halved = dataclasses.replace(ample, exchange_parts=2)
    assert halved.hidden_exchange == pytest.approx(ample.exchange * 3 / 4)
    assert halved.seconds < ample.seconds
    experts = sum(slow.parts[name].seconds for name in ("routed", "shared"))
    assert dataclasses.replace(slow, exchange_parts=2).hidden_exchange == pytest.approx(experts)
    between = dataclasses.replace(quick, transfers=slow.transfers[:0])
    assert isinstance(between, Step) and between.waiting == 0


def test_the_search_finds_what_fits_and_the_fastest_first() -> None:
    planned, machine = case(fsdp=8), topology(fast_links=1e9, memory_bandwidth=1e11)
    ways = search(planned, machine, FULL, None)
    assert len({way.case.mesh for way in ways}) == len(ways) == 5
    assert [way.step.seconds for way in ways] == sorted(way.step.seconds for way in ways)
    fastest = min(step(c, machine, FULL).seconds for c in candidates(planned, machine))
    assert ways[0].step.seconds == fastest
    # With less memory than the fastest takes, another one comes first, and it fits.
    tight = topology(fast_links=1e9, memory_bandwidth=1e11, memory=ways[0].memory)
    others = search(planned, tight, FULL, None)
    assert others and all(way.memory <= memory.USABLE * ways[0].memory for way in others)
    assert others[0].step.seconds >= fastest
    assert search(planned, topology(memory=1.0), FULL, None) == []
    nearest = smallest(planned, machine)
    assert nearest is not None
    assert nearest[1] == min(sum(memory.memory(c).values()) for c in candidates(planned, machine))


def test_every_candidate_runs_as_its_flags_say() -> None:
    planned = case(fsdp=2, expert=4)
    all_tokens = planned.tokens * planned.micro_batches
    moe = dataclasses.replace(planned.config.model.moe, exchange_parts=all_tokens)
    model = dataclasses.replace(planned.config.model, moe=moe)
    parts = planned.with_config(dataclasses.replace(planned.config, model=model))
    numbers = []
    for of in (planned, parts):
        ways = list(candidates(of, topology()))
        for candidate in ways:
            validation.check_mesh(candidate.config, candidate.sizes)
        numbers.append(len(ways))
    assert 0 < numbers[1] < numbers[0]  # so many parts need as many tokens
    assert flags(planned.config) == [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=2",
        "--config.mesh.expert_outer=1",
        "--config.mesh.expert=4",
        "--config.training.micro_batches=2",
        "--config.training.rematerialization=latent",
    ]


def test_a_batch_that_does_not_divide_has_no_candidates() -> None:
    assert list(candidates(dataclasses.replace(case(fsdp=8), devices=3), topology(3))) == []
    assert smallest(dataclasses.replace(case(fsdp=8), devices=3), topology(3)) is None
