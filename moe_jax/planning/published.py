"""Published training runs beside what is planned for them.

Operations per token come from our configs and count (`planning/operations.py`), a device's peak
from `machines.toml`. The one thing taken from a publication is the MFU that it states, always over
the bf16 peak, whatever products ran in FP8. A row says where its MFU is from; where a publication
states none, another run's is taken, never one that is worked out from the row's own hours.
"""

import dataclasses
import runpy
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import moe_jax
from moe_jax import validation
from moe_jax.config import ModelConfig, UserError
from moe_jax.planning import machines
from moe_jax.planning.operations import Parameters, count, training_operations
from moe_jax.planning.weights import weights_of

CONFIGS = Path(moe_jax.__file__).parents[1] / "configs"
PRICE = 2.0  # $ per H800-hour, as DeepSeek-V3 has it in table 1

# Where figures and MFUs are published.
V3 = (
    "DeepSeek-V3 (arXiv 2412.19437), table 1: 14.8 T tokens on 2,048 H800, 2 $ an hour; the 5 K "
    "hours of post-training are its own"
)
INSIGHTS = (
    "Insights into DeepSeek-V3 (arXiv 2505.09343), table 4: 272.8 B tokens a day on 2,048 H800 at "
    "385 TFLOP/s, attention's causal half counted, prediction ahead not"
)
V3_MFU = "38.94 %, the causal one of Insights into DeepSeek-V3, table 4"
V2 = "DeepSeek-V2 (arXiv 2405.04434), section 3.2.3: H800-hours per T tokens"
V2_MFU = (
    "38.94 %, DeepSeek-V3's, for want of its own. V2 trained in bf16 a year earlier and drops "
    "tokens: the error says that it got less"
)
LLAMA = "Llama 3.1 405B's model card: H100-hours, interruptions and later stages with them"
LLAMA_MFU = "41 % at 16,384 H100 and 8,192 tokens, The Llama 3 Herd (arXiv 2407.21783), table 4"
NVIDIA = (
    "NVIDIA Megatron-Bridge, performance summary, container 26.02: its own count, TFLOP/s over "
    "tokens/s of a GPU (H100 for Llama 3, GB300 for DeepSeek-V3 with prediction ahead)"
)
MIXTRAL = "Mistral AI, Mixtral of experts, December 2023; it published neither hours nor tokens"
GPT4 = (
    "An estimate and no publication: SemiAnalysis, July 2023: 13 T tokens, 16 experts of 111 B of "
    "which 2 are used, 55 B for all tokens; 25,000 A100 for 90 to 100 days"
)
GPT4_MFU = (
    "34 %, between the 32 and 36 % of the same estimate, which follow from its hours: the row only "
    "says that the estimate agrees with itself"
)


class Row(NamedTuple):
    """A figure, planned and published, and where the published one and the MFU are from."""

    run: str
    figure: str
    planned: float
    published: float
    source: str
    mfu_from: str | None = None  # None: no MFU is in it

    @property
    def error(self) -> float:
        """Of what is planned, relative to what is published."""
        return self.planned / self.published - 1


def table() -> list[Row]:
    """All rows.

    Raises:
      UserError: the project's configs are not beside the package.
    """
    return [*_deepseek_v3(), *_deepseek_v2(), *_llama_3(), *_mixtral(), *_gpt_4()]


def _deepseek_v3() -> list[Row]:
    run, mfu = "DeepSeek-V3", 0.3894
    main, parameters = _model("deepseek_v3", num_nextn_predict_layers=0)
    operations = training_operations(main, parameters, 4096)
    pretraining = _hours(operations, 14.8e12, "h800", mfu)
    # Section 4.3: 1,000 steps of 1,920 rows of 32 K, then of 480 rows of 128 K.
    extension = sum(
        _hours(training_operations(main, parameters, length), 1e3 * rows * length, "h800", mfu)
        for rows, length in ((1920, 2**15), (480, 2**17))
    )
    tuning = 5e3  # published; what it did is not
    hours = pretraining + extension + tuning
    planned, measured = 14.8e12 / pretraining / 3600, 272.8e9 / 24 / 3600 / 2048
    ahead = training_operations(*_model("deepseek_v3"), 4096)
    return [
        Row(run, "operations/token", operations, 385e12 / measured, INSIGHTS),
        Row(run, "  predicting ahead", ahead, 1199e12 / 4612, NVIDIA),
        Row(run, "tokens/s per GPU", planned, measured, INSIGHTS, V3_MFU),
        Row(run, "pre-training, hours", pretraining, 2664e3, V3, V3_MFU),
        Row(run, "longer context, hours", extension, 119e3, V3, V3_MFU),
        Row(run, "in all, hours", hours, 2788e3, V3, V3_MFU),
        Row(run, "in all, $", PRICE * hours, 5.576e6, V3, V3_MFU),
    ]


def _deepseek_v2() -> list[Row]:
    operations = training_operations(*_model("deepseek_v2"), 4096)
    hours = _hours(operations, 1e12, "h800", 0.3894)
    return [Row("DeepSeek-V2", "hours/T tokens", hours, 172.8e3, V2, V2_MFU)]


def _llama_3() -> list[Row]:
    run, operations = "Llama 3 405B", training_operations(*_model("llama3_405b"), 8192)
    hours = _hours(operations, 15.6e12, "h100", 0.41)
    return [
        Row(run, "operations/token", operations, 784e12 / 311, NVIDIA),
        Row(run, "in all, hours", hours, 30.84e6, LLAMA, LLAMA_MFU),
    ]


def _mixtral() -> list[Row]:
    run, (_, parameters) = "Mixtral 8x7B", _model("mixtral_8x7b")
    return [
        Row(run, "parameters", parameters.total, 46.7e9, MIXTRAL),
        Row(run, "  of one token", parameters.active, 12.9e9, MIXTRAL),
    ]


def _gpt_4() -> list[Row]:
    run, operations = "GPT-4 (estimates)", 6 * (2 * 111e9 + 55e9)  # without attention's scores
    hours = _hours(operations, 13e12, "a100", 0.34)
    return [
        Row(run, "operations", operations * 13e12, 2.15e25, GPT4),
        Row(run, "in all, hours", hours, 25e3 * 95 * 24, GPT4, GPT4_MFU),
    ]


def _hours(operations: float, tokens: float, machine: str, mfu: float) -> float:
    """Device-hours for so many tokens of so many operations."""
    return tokens * operations / (machines.read()[machine].rate("bfloat16") * mfu) / 3600


def _model(name: str, **changes: Any) -> tuple[ModelConfig, Parameters]:
    """A model of ours and its parameters."""
    file = CONFIGS / f"{name}.py"
    if not file.exists():
        raise UserError(f"the table reads the project's configs, and {file} is not there")
    config = validation.parse(runpy.run_path(str(file))["get_config"]())
    model = dataclasses.replace(config.model, **changes)
    return model, count(weights_of(model), model)


def text(rows: list[Row]) -> list[str]:
    """The table in 80 columns, and under it where figures are from, by letter."""
    notes: list[str] = []

    def letter(note: str | None) -> str:
        if note is None:
            return "-"
        if note not in notes:
            notes.append(note)
        return "abcdefghijklmnopqrstuvwxyz"[notes.index(note)]

    lines = [
        f"{'run':18} {'figure':22} {'planned':>9} {'published':>9} {'error':>6}  from  MFU",
        "-" * 80,
    ]
    before = ""
    for row in rows:
        name = row.run if row.run != before else ""
        planned, published = _figure(row.planned), _figure(row.published)
        lines.append(
            f"{name:18} {row.figure:22} {planned:>9} {published:>9} {row.error:>+6.1%}  "
            f"{letter(row.source):4}  {letter(row.mfu_from)}"
        )
        before = row.run
    lines.append("")
    for note in notes:
        first = f"{letter(note)}  "
        lines += textwrap.wrap(note, 80, initial_indent=first, subsequent_indent="   ")
    return lines


def _figure(value: float) -> str:
    """Four digits, as far as they are: 1,537; 172.8 K; 2.664 M."""
    if value < 1e5:
        return f"{value:,.0f}"
    for scale, unit in ((1e24, "Y"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    raise AssertionError(value)
