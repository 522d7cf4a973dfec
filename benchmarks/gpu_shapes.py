"""What `benchmarks.gpu` runs. Of the standard library alone: peers read it in their environment."""

import random
from typing import NamedTuple


class Case(NamedTuple):
    """One device's experts: model dim, hidden dim of an expert, experts, rows that chose one."""

    name: str
    dim: int
    hidden: int
    experts: int
    rows: int

    def products(self) -> dict[str, tuple[int, int]]:
        """By name, the dims of an expert's matrix."""
        return {"gate and up": (self.dim, 2 * self.hidden), "down": (self.hidden, self.dim)}


class Step(NamedTuple):
    """A train step of DeepSeek-V2-Lite with fewer layers, the first of them dense."""

    layers: int
    rows: int
    length: int


CASES = {
    False: (
        Case("V2-Lite", 2048, 1408, 8, 32768),
        Case("V2-Lite", 2048, 1408, 64, 49152),
        Case("V3", 7168, 2048, 4, 16384),
        Case("V3", 7168, 2048, 8, 32768),
    ),
    True: (Case("tiny", 64, 64, 4, 512),),
}
STEPS = {False: Step(4, 6, 4096), True: Step(2, 2, 64)}
# In eight bits and in bf16: rows, and a weight's dims in DeepSeek-V3; of experts also how many.
FP8_ROWS = {False: 4096, True: 256}
FP8_DENSE = {
    False: {"query up": (1536, 24576), "attention's output": (16384, 7168), "gate": (7168, 18432)},
    True: {"tiny": (128, 128)},
}
FP8_GROUPED = {
    False: {"gate and up": (8, 7168, 4096), "down": (8, 2048, 7168)},
    True: {"tiny": (2, 128, 128)},
}
MATRIX_DIM = {False: 8192, True: 256}  # of the square product that gives the machine's rate
ROUTINGS = ("balance forced", "real (Zipf)")


def rows_of_experts(case: Case, routing: str) -> list[int]:
    """Balanced, or in proportion to 1 / rank with the ranks in random order."""
    if routing == "balance forced":
        shares = [1.0] * case.experts
    else:
        shares = [1 / rank for rank in range(1, case.experts + 1)]
        random.Random(0).shuffle(shares)
    rows = [int(case.rows * share / sum(shares)) for share in shares]
    rows[rows.index(max(rows))] += case.rows - sum(rows)
    return rows
