"""Serving: the arrays of a real cache, counts by hand, and what others have measured."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from emulated import make_mesh
from jax.sharding import NamedSharding
from raw_configs import CONFIGS, load

from moe_jax import validation
from moe_jax.config import Config
from moe_jax.inference.sampling import GREEDY
from moe_jax.inference.steps import Steps
from moe_jax.models.language_model import LanguageModel, abstract_weights
from moe_jax.ops.cached_attention import absorbed_attention
from moe_jax.planning import machines
from moe_jax.planning.compiled import Walk
from moe_jax.planning.estimate import Efficiency
from moe_jax.planning.memory import USABLE
from moe_jax.planning.operations import Parameters, count
from moe_jax.planning.serving import (
    SOCKET,
    Host,
    Serving,
    by_machine,
    fewest,
    figures,
    lines,
    placed,
)
from moe_jax.planning.weights import weights_of
from moe_jax.sharding import BATCH, P

COMPUTE, MEMORY, LINKS = Efficiency()
EXPERT = 58 * 3 * 7168 * 2048  # weights of one of V3's routed experts, in all layers
COMMON = 671_026_419_200 - 256 * EXPERT


@pytest.fixture(scope="module")
def v3() -> tuple[Config, Parameters]:
    config = validation.parse(load(CONFIGS / "deepseek_v3.py"))
    return config, count(weights_of(config.model), config.model)


def _serving(v3, topology: str, context: int = 4096, **options) -> Serving:
    config, parameters = v3
    return Serving(config.model, parameters, machines.parse(topology), context, **options)


def test_a_token_takes_what_the_cache_allocates(v3) -> None:
    config, rows, slots = v3[0], 3, 40
    mesh = make_mesh()
    weights = abstract_weights(config.model, mesh, jnp.bfloat16)
    model = LanguageModel(config.model, config.precision, mesh, *weights)
    steps = Steps(model.graphdef, slots, GREEDY, speculative=False)
    with jax.set_mesh(mesh):
        tokens, lengths, seed = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in (
                ((rows, 16), "int32", BATCH),
                ((rows,), "int32", BATCH),
                ((), "uint32", P()),
            )
        )
        *_, cache = jax.eval_shape(steps.prefill, model.weights, seed, tokens, lengths)
    allocated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    own = figures(_serving(v3, "h200:8"))["cache_bytes_per_token"]
    assert own == {"own": 70_272, "all_heads": 3_997_696, "8_groups": 249_856}
    assert allocated == own["own"] * rows * slots


def test_room_by_hand(v3) -> None:
    serving = _serving(v3, "h200:8")
    room = USABLE * 141e9 - COMMON - 32 * EXPERT
    assert serving.room == pytest.approx(room)
    assert serving.longest == room // 70_272
    assert serving.sequences == 8 * (room // (70_272 * 4096))
    # Half as many devices share a sequence: the common weights and its cache are halved.
    shared = dataclasses.replace(serving, shared_by=2)
    assert shared.room == pytest.approx(room + COMMON / 2)
    assert shared.longest == 2 * (room + COMMON / 2) // 70_272
    assert _serving(v3, "h200:8", weights="bfloat16").sequences == 0
    # With more devices than experts, several share one.
    assert _serving(v3, "h200:64x8").room == pytest.approx(USABLE * 141e9 - COMMON - EXPERT / 2)


def test_experts_that_tokens_choose(v3) -> None:
    """Two of four experts for each of three tokens: all choices, counted."""
    config, parameters = v3
    moe = dataclasses.replace(config.model.moe, num_experts=4, num_experts_per_tok=2)
    model = dataclasses.replace(config.model, moe=moe)
    serving = Serving(model, parameters, machines.parse("h200:1"), 1)
    pairs = list(itertools.combinations(range(4), 2))
    choices = list(itertools.product(pairs, repeat=3))
    mean = sum(len(set().union(*choice)) for choice in choices) / len(choices)
    assert serving.touched(3) == pytest.approx(mean)


def test_one_sequence_on_one_card_with_its_experts_on_the_host(v3) -> None:
    assert _serving(v3, "h100:1").sequences == 0
    over_pcie = _serving(v3, "h100:1", host=Host(bandwidth=64e9))
    seconds = over_pcie.decode(1)
    assert seconds["host"] == pytest.approx(8 * EXPERT / 64e9)
    assert seconds["memory"] == pytest.approx((COMMON + 4096 * 70_272) / 3352e9 / MEMORY)
    assert seconds.keys() == {"host", "compute", "memory"}
    # A host that computes is bound by its memory for one sequence, by its units for many.
    on_socket = _serving(v3, "h100:1", host=SOCKET)
    assert on_socket.decode(1)["host"] == pytest.approx(8 * EXPERT / 300e9)
    assert on_socket.decode(4096)["host"] == pytest.approx(4096 * 2 * 8 * EXPERT / 20e12)
    groups = v3[1].by_group
    products = 2 * sum(groups[g] for g in ("attention", "dense", "shared", "router", "head"))
    scores = 2 * 61 * 128 * (512 + 64 + 512) * 4096
    common = (products / 1979e12 + scores / 989e12) / COMPUTE
    assert on_socket.decode(1)["compute"] == pytest.approx(common)
    routed = 2 * 8 * EXPERT / 1979e12 / COMPUTE
    assert seconds["compute"] == pytest.approx(common + routed)


def test_attention_to_the_cache_counts_what_a_program_computes() -> None:
    heads, nope, rope, value, latent, slots = 3, 8, 4, 8, 16, 24
    shapes = (
        *((1, 1, heads, nope), (1, 1, heads, rope), (1, slots, latent), (1, slots, rope)),
        *((latent, heads, nope), (latent, heads, value)),
    )
    arrays = [jnp.ones(shape) for shape in shapes]
    positions = jnp.zeros((1, 1), jnp.int32)
    program = jax.jit(lambda *x: absorbed_attention(*x, positions, 1.0)).lower(*arrays).compile()
    config = validation.parse(load(CONFIGS / "tiny.py")).model
    attention = dataclasses.replace(
        config.attention,
        num_heads=heads,
        q_lora_rank=None,
        kv_lora_rank=latent,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
    )
    model = dataclasses.replace(
        config, num_hidden_layers=1, first_k_dense_replace=1, attention=attention
    )
    parameters = count(weights_of(model), model)
    longer, shorter = (
        Serving(model, parameters, machines.parse("h100:1"), context, weights="bfloat16")
        for context in (10 + slots, 10)
    )
    # What more slots add is attention's; what makes keys and values counts with the weights.
    added = (longer.decode(1)["compute"] - shorter.decode(1)["compute"]) * 989e12 * COMPUTE
    up = 2 * latent * heads * (nope + value)
    assert Walk(program.as_text()).counts().operations == pytest.approx(added + up)


def test_deepseeks_own_serving_lies_between_the_bounds(v3) -> None:
    """DeepSeek-V3/R1 Inference System Overview: a node of 8 H800 writes 14.8 K tokens/s with 4,989
    cached ones, 18 nodes together; it reads 73.7 K, 56.3 % of them from a cache, 4 together."""
    decoding = figures(_serving(v3, "h800:18x8", 4989))["decode"]
    least, most = (bound / 18 for bound in decoding["tokens_per_second"])
    assert least < 14.8e3 < most < 3 * 14.8e3
    reading = figures(_serving(v3, "h800:4x8", 4989))["prefill"]
    least, most = (bound / 4 for bound in reading["tokens_per_second"])
    # What a prompt is padded by and waits for is in neither.
    assert 0.8 * least < 73.7e3 * (1 - 0.563) < most


@pytest.mark.parametrize(
    ("topology", "far", "near"),
    [
        # One of eight experts: a token of ten stays in one case of eight.
        ("h100:8", 0, 10 * 7 / 8),
        # Half of them cross, once; of twenty in each half, an eighth goes to each of three others.
        ("h100:2x4", 10 / 2, 3 * 20 / 8),
    ],
)
def test_links_by_hand(v3, topology: str, far: float, near: float) -> None:
    config, parameters = v3
    moe = dataclasses.replace(
        config.model.moe,
        num_experts=8,
        num_experts_per_tok=1,
        num_expert_groups=1,
        num_limited_groups=1,
    )
    model = dataclasses.replace(config.model, moe=moe)
    seconds = Serving(model, parameters, machines.parse(topology), 4096).decode(80)
    row = 7168 * (1 + 2) * 58  # there in FP8 and back in bf16, in all routed layers
    assert seconds["fast links"] == pytest.approx(near * row / 450e9 / LINKS)
    assert seconds.get("slow links", 0) == pytest.approx(far * row / 50e9 / LINKS)
    assert seconds["latency"] == pytest.approx(2 * 58 * 3.3e-6)


def test_a_dense_model_whose_weights_devices_share() -> None:
    model = validation.parse(load(CONFIGS / "llama3_405b.py")).model
    parameters = count(weights_of(model), model)
    serving = placed(model, parameters, machines.parse("h200:8"), 8192)
    assert serving.shared_by == 4  # 405 GB in FP8: a half does not fit one, a quarter does
    assert figures(serving)["cache_bytes_per_token"]["own"] == 516_096
    assert "            4 devices share a sequence" in lines(serving)
    seconds = serving.decode(2)  # one in each group
    read = (405_853_388_800 + 8192 * 516_096) / 4
    assert seconds["memory"] == pytest.approx(read / 4800e9 / MEMORY)
    assert seconds["latency"] == pytest.approx(126 * 3.3e-6)


def test_prices(v3) -> None:
    found = figures(_serving(v3, "h200:8"), price=3.0)["decode"]
    for rate, price in zip(
        found["tokens_per_second"], reversed(found["price_per_million_tokens"]), strict=True
    ):
        assert price * rate * 3600 / 1e6 == pytest.approx(8 * 3.0)


@pytest.mark.parametrize("context", [2**17, 2**20])
@pytest.mark.parametrize("name", ["h100", "h200", "v5p", "mi300x", "groq"])
def test_no_fewer_devices_hold_a_long_sequence(v3, name: str, context: int) -> None:
    config, parameters = v3
    machine = machines.read()[name]
    serving = fewest(config.model, parameters, machine, context)
    assert serving is not None and serving.sequences > 0
    assert serving.longest >= context
    devices = serving.topology.devices
    # The weights and one sequence's cache together are what must fit.
    assert devices * USABLE * machine.memory > 671e9 + context * 70_272
    half = serving.topology._replace(
        devices=devices // 2, domain=min(devices // 2, serving.topology.domain)
    )
    for shared_by in (2**i for i in range(half.domain.bit_length())):
        assert not dataclasses.replace(serving, topology=half, shared_by=shared_by).sequences


def test_the_lines_fit_and_tell_what_does_not(v3) -> None:
    config, parameters = v3
    told = lines(_serving(v3, "h200:8"), price=3.0)
    assert told[2:4] == [
        "cache       70,272 bytes per token; keys and values of all 128 heads",
        "            3,997,696 (56.9x), of 8 groups 249,856 (3.6x)",
    ]
    assert told[4] == "fits        776 sequences; alone, one of 399,074 tokens"
    refused = lines(_serving(v3, "h100:1"))
    missing = (COMMON + 256 * EXPERT - USABLE * 80e9) / 1e9
    assert f"no: weights need {missing:,.1f} GB more a device" in refused[4]
    assert refused[5:] == [
        "            experts on hosts, read over its links: 3.07 to 3.13 tokens/s",
        "            experts on hosts, computed there (estimate): 13.4 to 14.7 tokens/s",
    ]
    one = machines.read()["rtx4090"]._replace(name="lonely", fast_domain=1, slow_links=0.0)
    compared = by_machine(config.model, parameters, [*machines.read().values(), one], 2**20)
    assert compared[-1] == "lonely         4,096 devices do not hold it"
    assert max(len(line) for line in told + refused + compared) <= 80
