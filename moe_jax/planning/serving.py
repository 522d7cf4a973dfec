"""Serving as a roofline: what a device reads, computes and sends to read prompts and to write.

Sequences are split over devices, and a device keeps their whole cache, as `generate` does. It also
has all weights but those of routed experts, which are split over all devices (so, nearly,
DeepSeek-V3 is served: section 3.4). Times are bounds: at best all parts overlap, at worst none.
The bytes that devices that share a sequence send one another, a scheduler's gaps and speculation
are in neither.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.layers.cache import values_per_token
from moe_jax.planning.communication import exchanged_rows
from moe_jax.planning.estimate import Efficiency
from moe_jax.planning.machines import Machine, Topology
from moe_jax.planning.memory import USABLE, cache_per_token
from moe_jax.planning.operations import Parameters, forward_operations

# Seconds until a few bytes arrive: over NVLink, Insights into DeepSeek-V3 (arXiv 2505.09343), table
# 5; over other links it is an assumption.
LATENCY = 3.3e-6
MOST = 4096  # devices that are tried
COMBINE_BYTES = 2  # of a value on its way back from an expert


class Host(NamedTuple):
    """Where routed experts lie that devices have no room for; figures are of one device's share.

    bandwidth: bytes a second at which they are read.
    operations: a second, where the host itself computes them; None: the device does.
    """

    bandwidth: float
    operations: float | None = None


# An estimate: a socket with 8 channels of DDR5-4800, and what its matrix units get in bf16.
SOCKET = Host(bandwidth=300e9, operations=20e12)


@dataclasses.dataclass(frozen=True)
class Serving:
    """A model on devices, with sequences of one length.

    Args:
      parameters: of the model, counted.
      context: tokens of a sequence in the cache.
      weights, cache: dtypes; products with weights run in theirs, attention's in bfloat16.
      shared_by: devices that share a sequence: its cache, its attention and the weights that are
        not routed, evenly. More than 1 is not what `generate` does.
      host: where routed experts lie, if not on devices.
      efficiency: shares of the stated rates that are reached.
    """

    model: ModelConfig
    parameters: Parameters
    topology: Topology
    context: int
    weights: str = "float8_e4m3fn"
    cache: str = "bfloat16"
    shared_by: int = 1
    host: Host | None = None
    efficiency: Efficiency = Efficiency()

    @property
    def cache_per_token(self) -> int:
        """Bytes."""
        return values_per_token(self.model) * jnp.dtype(self.cache).itemsize

    @property
    def common_bytes(self) -> float:
        """Weights on a device that are not of routed experts."""
        common = self.parameters.total - self.parameters.by_group["routed"]
        return common * jnp.dtype(self.weights).itemsize / self.shared_by

    @property
    def expert_bytes(self) -> float:
        """One routed expert of all layers."""
        routed = self.parameters.by_group["routed"] * jnp.dtype(self.weights).itemsize
        return routed / self.model.moe.num_experts

    @property
    def experts(self) -> float:
        """Of each layer on a device, or in its host's memory for it; several may share one."""
        experts = self.model.moe.num_experts / self.topology.devices
        return math.ceil(experts) if experts > 1 else experts

    @property
    def room(self) -> float:
        """Bytes of a device for cache; below 0: the weights do not fit."""
        experts = 0 if self.host else self.experts * self.expert_bytes
        return USABLE * self.topology.machine.memory - self.common_bytes - experts

    @property
    def longest(self) -> int:
        """The longest context that a sequence can have, in tokens."""
        return max(0, int(self.room * self.shared_by // self.cache_per_token))

    @property
    def sequences(self) -> int:
        """That fit at once, with the context."""
        return self.groups * (self.longest // self.context)

    @property
    def groups(self) -> int:
        """Of devices that share sequences."""
        return self.topology.devices // self.shared_by

    def decode(self, sequences: int) -> dict[str, float]:
        """Seconds of one more token of each sequence, by part."""
        scores = self._scores_of_cached * self.context
        return self._seconds(sequences, 1, scores, self.context * self.cache_per_token)

    def prefill(self) -> dict[str, float]:
        """Seconds to read a prompt as long as the context in each group of devices, by part."""
        scores = self._forward["scores"] * self.context
        cached = self.context * self.cache_per_token
        return self._seconds(self.groups, self.context, scores, cached)

    @functools.cached_property
    def _forward(self) -> Mapping[str, float]:
        """Operations of a token of a prompt, by group."""
        main = dataclasses.replace(self.model, num_nextn_predict_layers=0)
        return forward_operations(main, self.parameters, self.context)

    @property
    def _scores_of_cached(self) -> float:
        """Operations of a new token with each cached one, in all layers.

        Latent attention does without keys and values (`ops/cached_attention.py`): queries meet
        latents, and these are summed.
        """
        sizes = self.model.attention
        if sizes.kind == "latent":
            dims = sizes.kv_lora_rank + sizes.qk_rope_head_dim + sizes.kv_lora_rank
        else:
            dims = 2 * sizes.head_dim
        return 2.0 * self.model.num_hidden_layers * sizes.num_heads * dims

    def _seconds(
        self, sequences: int, tokens: int, scores: float, cached: float
    ) -> dict[str, float]:
        """Of a step of the busiest device, by part.

        Args:
          tokens: new ones of each sequence.
          scores: operations of a sequence's attention without weights.
          cached: bytes of its cache, read or written.
        """
        machine, devices = self.topology.machine, self.topology.devices
        mine = math.ceil(sequences / self.groups) / self.shared_by
        routed = self._forward["routed"] * sequences * tokens / devices
        common = sum(self._forward.values()) - self._forward["scores"] - self._forward["routed"]
        read = self.touched(sequences * tokens) * self.expert_bytes

        products, reads = common * mine * tokens, self.common_bytes + mine * cached
        seconds = {}
        if self.host is None:
            reads += read
        else:
            seconds["host"] = read / self.host.bandwidth
        if self.host is None or self.host.operations is None:
            products += routed
        else:
            seconds["host"] = max(seconds["host"], routed / self.host.operations)
        rates = machine.rate(self.weights), machine.rate("bfloat16")
        share = self.efficiency
        seconds["compute"] = (products / rates[0] + mine * scores / rates[1]) / share.products
        seconds["memory"] = reads / machine.memory_bandwidth / share.memory
        return seconds | self._exchange(sequences * tokens / devices)

    def touched(self, tokens: int) -> float:
        """Experts of a layer on a device that so many tokens choose, each at random."""
        moe = self.model.moe
        return self.experts * (1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** tokens)

    def _exchange(self, tokens: float) -> dict[str, float]:
        """Seconds to bring a device's tokens to their experts and back."""
        machine, moe = self.topology.machine, self.model.moe
        devices = min(self.topology.devices, moe.num_experts)
        routed_layers = self.model.num_hidden_layers - self.model.first_k_dense_replace
        # A shared sequence's attention is put together once a layer.
        together = self.model.num_hidden_layers if self.shared_by > 1 else 0
        if devices == 1:
            return {}
        seconds = {"latency": (2 * routed_layers + together) * LATENCY}
        if not routed_layers:
            return seconds
        domains = max(1, devices // self.topology.domain)
        far = exchanged_rows(moe, 1, (domains,))  # of one token
        near = exchanged_rows(moe, 1, (domains, devices // domains)) - far
        row = self.model.hidden_size * (jnp.dtype(self.weights).itemsize + COMBINE_BYTES)
        row *= tokens / self.efficiency.links
        seconds["fast links"] = near * row * routed_layers / machine.fast_links
        if domains > 1:
            seconds["slow links"] = far * row * routed_layers / machine.slow_links
        return seconds


def figures(serving: Serving, price: float | None = None) -> dict[str, Any]:
    """What is told of it, for JSON; of what is bounded, [least, most].

    Args:
      price: of a device-hour.
    """
    model, itemsize = serving.model, jnp.dtype(serving.cache).itemsize
    found: dict[str, Any] = {
        "cache_bytes_per_token": cache_per_token(model, itemsize),
        "context": serving.context,
        "longest_context": serving.longest,
        "sequences": serving.sequences,
    }
    if not serving.sequences:
        return found
    prompts = serving.groups
    for name, sequences, tokens, seconds in (
        ("decode", serving.sequences, serving.sequences, serving.decode(serving.sequences)),
        ("decode_one", 1, 1, serving.decode(1)),
        ("prefill", prompts, prompts * serving.context, serving.prefill()),
    ):
        bounds = [tokens / sum(seconds.values()), tokens / max(seconds.values())]
        found[name] = {"sequences": sequences, "seconds": seconds, "tokens_per_second": bounds}
        if price is not None:
            million = 1e6 * price * serving.topology.devices / 3600
            found[name]["price_per_million_tokens"] = [million / b for b in reversed(bounds)]
    return found


def lines(serving: Serving, price: float | None = None) -> list[str]:
    """The same for a person, in 80 columns."""
    topology, found = serving.topology, figures(serving, price)
    cache, heads = found["cache_bytes_per_token"], serving.model.attention.num_heads
    own = cache["own"]
    told = [
        f"serving     {topology.name}, context {serving.context:,}",
        f"            weights {serving.weights}, cache {serving.cache}",
        f"cache       {own:,} bytes per token; keys and values of all {heads} heads",
        f"            {cache['all_heads']:,} ({cache['all_heads'] / own:.1f}x)",
    ]
    if cache["8_groups"] < cache["all_heads"]:
        told[-1] += f", of 8 groups {cache['8_groups']:,} ({cache['8_groups'] / own:.1f}x)"
    if serving.shared_by > 1:
        told.append(f"            {serving.shared_by} devices share a sequence")
    if serving.room < 0:
        told.append(
            f"fits        no: weights need {-serving.room / 1e9:,.1f} GB more a device than the "
            f"{USABLE:.0%} of its memory"
        )
        return told + _with_hosts(serving)
    told.append(
        f"fits        {serving.sequences:,} sequences; alone, one of {serving.longest:,} tokens"
    )
    for name, title in (("decode", "decode"), ("decode_one", "  alone"), ("prefill", "prefill")):
        if name in found:
            part = found[name]
            least, most = part["tokens_per_second"]
            longest = max(part["seconds"], key=part["seconds"].get)
            text = f"{title:11} {_short(least)} to {_short(most)} tokens/s, bound by {longest}"
            if price is not None:
                low, high = part["price_per_million_tokens"]
                told.append(text)
                text = f"            {_short(low)} to {_short(high)} for a million"
            told.append(text)
    return told


def _with_hosts(serving: Serving) -> list[str]:
    """How fast one sequence is written with routed experts in the memory of hosts, as lines."""
    links, told = serving.topology.machine.host_links, []
    ways = [("read over its links", Host(links))] if links else []
    for way, host in (*ways, ("computed there (estimate)", SOCKET)):
        moved = dataclasses.replace(serving, host=host)
        if serving.host is None and serving.parameters.by_group["routed"] and moved.sequences:
            bounds = figures(moved)["decode_one"]["tokens_per_second"]
            rate = " to ".join(_short(bound) for bound in bounds)
            told.append(f"            experts on hosts, {way}: {rate} tokens/s")
    return told


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def placed(
    model: ModelConfig, parameters: Parameters, topology: Topology, context: int, **options: Any
) -> Serving:
    """With as few devices to a sequence as hold one this long; if none do, as hold the longest.

    Args:
      options: of `Serving`.
    """
    alone = Serving(model, parameters, topology, context, **options)
    sharing = (2**i for i in range(topology.domain.bit_length()) if topology.domain % 2**i == 0)
    tried = [dataclasses.replace(alone, shared_by=devices) for devices in sharing]
    fitting = (serving for serving in tried if serving.sequences)
    return next(fitting, None) or max(tried, key=lambda serving: serving.longest)


def fewest(
    model: ModelConfig, parameters: Parameters, machine: Machine, context: int, **options: Any
) -> Serving | None:
    """On the fewest devices, in powers of two, that hold a sequence this long; None: not `MOST`."""
    number = 1
    while number <= MOST:
        domain = min(number, machine.fast_domain or number)
        if number > domain and not machine.slow_links:
            return None
        topology = Topology(machine, number, domain, f"{machine.name}:{number}")
        serving = placed(model, parameters, topology, context, **options)
        if serving.sequences:
            return serving
        number *= 2
    return None


def by_machine(
    model: ModelConfig, parameters: Parameters, machines: Iterable[Machine], context: int
) -> list[str]:
    """For each machine, the fewest devices that decode at this context and how fast, as lines."""
    told = [
        f"{'at ' + format(context, ','):14} {'devices':>8} {'sharing':>8} {'sequences':>10} "
        f"{'tokens/s':>16} {'of one alone':>16}"
    ]
    for machine in machines:
        serving = fewest(model, parameters, machine, context)
        if serving is None:
            told.append(f"{machine.name:14} {MOST:,} devices do not hold it")
            continue
        found = figures(serving)
        all_of_them, alone = (
            " to ".join(_short(bound) for bound in found[name]["tokens_per_second"])
            for name in ("decode", "decode_one")
        )
        told.append(
            f"{machine.name:14} {serving.topology.devices:>8,} {serving.shared_by:>8,} "
            f"{serving.sequences:>10,} {all_of_them:>16} {alone:>16}"
        )
    return told
