"""A plan for a person, in 80 columns."""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.planning.memory import USABLE
from moe_jax.units import format_amount, format_bytes, format_count

Plan = Mapping[str, Any]


def lines(plan: Plan) -> list[str]:
    """Of `figures`; what it does not hold is left out."""
    told = list(_model(plan))
    if "topology" in plan:
        for part in (_machine, _memory, _communication, _time, _run):
            told += ["", *part(plan)]
    if "not_planned" in plan:
        told += ["", f"training not planned: {plan['not_planned']}"]
    if "alternatives" in plan:
        told += ["", *_alternatives(plan)]
    return told


def _model(plan: Plan) -> Iterator[str]:
    parameters, flops = plan["parameters"], plan["flops_per_token"]
    text = f"{format_count(parameters['total'])} in total, "
    text += f"{format_count(parameters['active'])} per token"
    if parameters["mtp"]:
        text += f"; {format_count(parameters['mtp'])} to predict ahead"
    yield f"parameters  {text}"
    yield f"operations  {flops['training'] / 1e9:,.4g} G a token, forward and backward"
    yield f"            {flops['six_n'] / 1e9:,.4g} G as 6N, attention's own products not counted"
    times = flops["dense_model"] / flops["training"]
    yield (
        f"            {flops['dense_model'] / 1e9:,.4g} G in a dense model of as many parameters, "
        f"{times:.1f}x"
    )
    yield f"            {flops['recomputed'] / 1e9:,.4g} G more are computed again"
    yield (
        f"            attention to {plan['attended_tokens']:,} tokens, half of them by causality"
    )
    yield ""
    yield f"{'':12}{'parameters':>12}{'forward':>12}{'share':>8}{'again':>12}"
    forward, again = flops["by_group"], flops["recomputed_by_group"]
    names = dict.fromkeys((*parameters["by_group"], *forward))
    for name in names:
        number = parameters["by_group"].get(name, parameters["mtp"] if name == "mtp" else 0)
        if not (number or forward.get(name)):
            continue
        yield (
            f"  {name:<10}{format_count(number) if number else '-':>12}"
            + (
                f"{forward[name] / 1e9:>10,.3f} G{forward[name] / flops['forward']:>8.1%}"
                if forward.get(name)
                else f"{'-':>12}{'-':>8}"
            )
            + (f"{again[name] / 1e9:>10,.3f} G" if again.get(name) else f"{'-':>12}")
        )
    cache = plan["cache_bytes_per_token"]
    own = cache["own"]
    yield ""
    yield f"cache       {own:,} bytes per token; keys and values of all heads"
    text = f"            {cache['all_heads']:,} ({cache['all_heads'] / own:.1f}x)"
    if cache["8_groups"] < cache["all_heads"]:
        text += f", of 8 groups {cache['8_groups']:,} ({cache['8_groups'] / own:.1f}x)"
    yield text


def _machine(plan: Plan) -> Iterator[str]:
    batch = plan["batch"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or "of one"
    yield f"machine     {plan['topology']}: {plan['devices']:,} devices; mesh {mesh}"
    rows = batch["rows_per_device"]
    yield (
        f"batch       {format_count(batch['tokens_per_step'])} tokens a step, in "
        f"{batch['micro_batches']} x {rows} row{'s' * (rows > 1)} of "
        f"{batch['sequence_length']:,} a device"
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan["memory_per_device"]
    verdict = "fits" if memory["fits"] else f"more than {USABLE:.0%} of it: does not fit"
    total, capacity = format_bytes(memory["total"]), format_bytes(memory["capacity"])
    yield f"memory      {total} of a device's {capacity}; {verdict}"
    policy = plan["batch"]["rematerialization"]
    for name, size in memory["by_kind"].items():
        if size:
            note = f"  rematerialization {policy}" if name == "kept activations" else ""
            yield f"  {name:<22}{format_bytes(size):>12}{note}"


def _communication(plan: Plan) -> Iterator[str]:
    sent = plan["communication_per_step"]
    yield f"sends       {format_bytes(sent['total'])} of a device in a step"
    if not sent["transfers"]:
        return
    yield f"{'':22}{'over':<24}{'fast links':>11}{'slow links':>12}{'alone':>11}"
    for transfer in sorted(sent["transfers"], key=lambda t: -t["seconds"]):
        axes = ",".join(transfer["axes"])
        if len(axes) > 24:
            axes = "all that split the batch"
        slow = format_bytes(transfer["slow"]) if transfer["slow"] else "-"
        fast = format_bytes(transfer["fast"]) if transfer["fast"] else "-"
        seconds = _seconds(transfer["seconds"])
        yield f"  {transfer['kind']:<20}{axes:<24}{fast:>11}{slow:>12}{seconds:>11}"


def _time(plan: Plan) -> Iterator[str]:
    rates, shares = plan["rates"], plan["efficiency"]
    waiting = plan["waiting_seconds"]
    yield f"time        {_seconds(plan['step_seconds'])} a step, at best"
    kinds = plan["communication_per_step"]["by_kind"]
    parts = {n: s for n, s in plan["seconds_by_part"].items() if n not in kinds}
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        yield f"  {name:<22}{_seconds(seconds):>12}{seconds / plan['step_seconds']:>8.1%}"
    if waiting:
        yield f"  {'waiting for links':<22}{_seconds(waiting):>12}" + (
            f"{waiting / plan['step_seconds']:>8.1%}"
        )
    if exchange := plan["waiting_for_exchange_seconds"]:
        parts = plan["batch"]["exchange_parts"]
        yield f"            {_seconds(exchange)} for tokens; model.moe.exchange_parts={parts}"
    yield (
        f"rates       {rates['operations'] / 1e12:,.4g} TFLOP/s x {shares['products']:g}, memory "
        f"{rates['memory'] / 1e9:,.4g} GB/s x {shares['memory']:g},"
    )
    slow = f" and {rates['slow_links'] / 1e9:,.4g}" if rates["slow_links"] else ""
    yield f"            links {rates['fast_links'] / 1e9:,.4g}{slow} GB/s x {shares['links']:g}"


def _run(plan: Plan) -> Iterator[str]:
    yield (
        f"speed       {plan['tokens_per_second_per_device']:,.4g} tokens/s of a device; MFU "
        f"{plan['mfu']:.1%}"
    )
    hours = format_amount(plan["device_hours"])
    yield (
        f"run         {format_count(plan['tokens'])} tokens in {hours} device-hours: "
        f"{format_amount(plan['days'])} days"
    )
    if plan["cost"] is not None:
        yield (
            f"cost        {format_amount(plan['cost'])} at {plan['price_per_device_hour']:g} a "
            "device-hour"
        )
    if plan["energy_kwh"] is not None:
        energy = format_amount(plan["energy_kwh"] / 1000)
        yield f"energy      {energy} MWh of the devices alone, at their limit"


def _alternatives(plan: Plan) -> Iterator[str]:
    found = plan["alternatives"]
    if found:
        yield "search      what fits, the fastest first; add to the command:"
    elif "nearest" in plan:
        yield "search      nothing fits: it takes more devices, or other ones. The nearest:"
    else:
        rows = plan["batch"]["tokens_per_step"] // plan["batch"]["sequence_length"]
        yield f"search      the {rows:,} rows of a step do not divide over the devices"
    for way in found or [plan[name] for name in ("nearest",) if name in plan]:
        speed = (
            f"{_seconds(way['step_seconds'])} a step, MFU {way['mfu']:.1%}, "
            if "mfu" in way
            else ""
        )
        yield f"  {speed}{format_bytes(way['memory'])} of a device"
        flags = way["flags"]
        yield from (f"  {' '.join(flags[i : i + 2])}" for i in range(0, len(flags), 2))


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:,.0f} s" if value >= 1000 else f"{value:.4g} s"
    for unit, size in (("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:,.4g} {unit}"
    return f"{value * 1e9:,.3g} ns"
