"""A part of `benchmarks.gpu`: torch's grouped product on the same cases.

Its weight gradient comes out in bfloat16, ours in float32.
"""

import json
import sys

import torch

from benchmarks.gpu_shapes import CASES, ROUTINGS, rows_of_experts
from benchmarks.timing import median_seconds


def main() -> None:
    cases = CASES["quick" in sys.argv[1:]]
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    def wait(_):
        if cuda:
            torch.cuda.synchronize()

    results = []
    for case in cases:
        for name, (dim_a, dim_b) in case.products().items():
            x, dy = normal(case.rows, dim_a), normal(case.rows, dim_b)
            w = normal(case.experts, dim_a, dim_b)
            for routing in ROUTINGS:
                rows = torch.tensor(rows_of_experts(case, routing), device=device)
                ends = torch.cumsum(rows, 0, dtype=torch.int32)
                calls = {
                    "forward": lambda x=x, w=w, e=ends: grouped_mm(x, w, offs=e),
                    "input gradient": lambda dy=dy, w=w, e=ends: grouped_mm(
                        dy, w.transpose(1, 2), offs=e
                    ),
                    "weight gradient": lambda x=x, dy=dy, e=ends: grouped_mm(x.t(), dy, offs=e),
                }
                for pass_, call in calls.items():
                    results.append(
                        {
                            "case": f"{case.name}, {case.experts} experts, {name}",
                            "routing": routing,
                            "pass": pass_,
                            "seconds": median_seconds(call, wait),
                        }
                    )
    print(json.dumps({"torch": torch.__version__, "products": results}))


if __name__ == "__main__":
    main()
