"""Says before a run what it needs, how fast it can go and what it costs.

    python -m moe_jax.plan --config=configs/deepseek_v3.py --topology=v5p:8x16x16

Nothing runs and no device is needed: a TPU slice is named by its chips (v5p:8x16x16), GPUs by hosts
and devices of each (h100:256x8), and cpu:8 is this machine, measured. Without --topology it counts
parameters and operations. Every field of the config can be set on the command line.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from moe_jax import command_line, validation
from moe_jax.config import UserError
from moe_jax.planning import (
    compare,
    compiled_step,
    machines,
    page,
    published,
    report,
    serving,
    topologies,
)
from moe_jax.planning.case import Case
from moe_jax.planning.estimate import Efficiency
from moe_jax.planning.figures import Question, of_model, of_run, of_search
from moe_jax.planning.operations import count
from moe_jax.training import ahead_of_time

DEFAULT = Efficiency()
CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.")
TOPOLOGY = flags.DEFINE_string("topology", None, "The machine and its size, such as h100:256x8.")
MACHINE = flags.DEFINE_string("machine", None, "A file of more machines, as machines.toml.")
SEARCH = flags.DEFINE_bool("search", False, "Look for what fits even if the config does.")
TOKENS = flags.DEFINE_float("tokens", None, "Of the run; by default as the config has it.")
PRICE = flags.DEFINE_float("price", None, "Of a device-hour.")
DOCUMENT = flags.DEFINE_integer("document_length", None, "Tokens of a document, on average.")
CONTEXT = flags.DEFINE_integer(
    "context", None, "Plan serving, with so many tokens cached; without --topology, on what."
)
PRODUCTS = flags.DEFINE_float("products", DEFAULT.products, "Share of the peak that they reach.")
MEMORY = flags.DEFINE_float("memory", DEFAULT.memory, "Share of its bandwidth that is reached.")
LINKS = flags.DEFINE_float("links", DEFAULT.links, "The same of links.")
COMPILE = flags.DEFINE_bool("compile", False, "Compile the train step, and hold the plan to it.")
JSON = flags.DEFINE_string("json", None, "Write all figures to this file.")
HTML = flags.DEFINE_string("html", None, "Write a page with pictures to this file.")
TABLE = flags.DEFINE_bool("table", False, "Show published runs beside what is planned for them.")
COMPARE = flags.DEFINE_string("compare", None, "Show how two plans in JSON differ: A.json B.json.")


def main(arguments: list[str]) -> None:
    if arguments[1:] and not COMPARE.value:
        raise UserError(f"{arguments[1]!r} is no flag; flags begin with --")
    if COMPARE.value:
        if not arguments[1:]:
            raise UserError("two files are compared, as in --compare A.json B.json")
        told = compare.lines(Path(COMPARE.value), Path(arguments[1]))
    elif TABLE.value:
        told = published.text(published.table())
    elif CONFIG.value is None:
        raise UserError("--config is missing; try --config=configs/tiny.py")
    else:
        told = plan()
    for line in told:
        print(line, flush=True)


def plan() -> Iterator[str]:
    """The lines of the plan that the flags ask for; writes the files they name."""
    config = validation.parse(CONFIG.value)
    efficiency = Efficiency(PRODUCTS.value, MEMORY.value, LINKS.value)
    question = Question(TOKENS.value, PRICE.value, DOCUMENT.value, CONTEXT.value, efficiency)
    question.check()
    command_line.check_writable(JSON, HTML)
    if COMPILE.value and DOCUMENT.value:
        raise UserError("--compile counts whole rows; leave out --document_length")
    known = machines.read() | (machines.read(Path(MACHINE.value)) if MACHINE.value else {})
    topology = machines.parse(TOPOLOGY.value, known) if TOPOLOGY.value else None
    figures: dict[str, Any] = {"config": command_line.config_name(CONFIG)}
    if topology is None:
        for flag in (COMPILE, SEARCH, TOKENS, PRICE, PRODUCTS, MEMORY, LINKS):
            if flag.present:
                raise UserError(f"--{flag.name} needs --topology, such as --topology=v5p:8x16x16")
        case = Case.without_mesh(config)
        figures |= of_model(case, question)
    else:
        if COMPILE.value:
            topologies.check(topology.machine.name)
        try:
            case = Case.of(config, topology.devices, topology.machine.platform)
        except UserError as error:  # serving asks for no mesh
            if CONTEXT.value is None or SEARCH.value or COMPILE.value:
                raise
            case = Case.without_mesh(config)
            figures |= of_model(case, question) | {"not_planned": str(error)}
        else:
            figures |= of_model(case, question) | of_run(case, topology, question)
            if SEARCH.value or not figures["memory_per_device"]["fits"]:
                figures |= of_search(case, topology, question)
    yield from report.lines(figures)
    if CONTEXT.value is not None:
        served = config.model, count(case.weights, config.model)
        if topology is None:
            lines = serving.by_machine(*served, known.values(), CONTEXT.value)
        else:
            service = serving.placed(*served, topology, CONTEXT.value, efficiency=efficiency)
            figures["serving"] = serving.figures(service, PRICE.value)
            lines = serving.lines(service, PRICE.value)
        yield from ["", *lines]
    if topology and COMPILE.value:  # takes minutes
        figures["compiled"] = ahead_of_time.figures(config, topology.name)
        yield from ["", *compiled_step.lines(figures["compiled"], figures)]
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n")
    if HTML.value:
        Path(HTML.value).write_text(page.page(figures))


if __name__ == "__main__":
    command_line.run(main, most_arguments=1)
