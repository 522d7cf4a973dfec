"""Work between start and done, in programs written by hand."""

import pytest

from moe_jax.planning.compiled import Walk
from moe_jax.planning.machines import Machine
from moe_jax.planning.overlap import overlaps

MACHINE = Machine("m", {"bfloat16": 1e6}, memory=1e6, memory_bandwidth=1e6, fast_links=1e3)
START = (
    "%s = ((f32[10,100]), f32[10,100]) all-to-all-start(%x), replica_groups={{0,1}}, dimensions={0}"
)
DONE = "%d = f32[10,100]{1,0} all-to-all-done(%s)"
PRODUCT = "%p = f32[10,10]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
LOOP = "%w = (s32[], f32[10,100]) while(%t), condition=%cond, body=%body"


def _walk(*lines: str) -> Walk:
    entry = "\n".join(f"  {line}" for line in ("%x = f32[10,100]{1,0} parameter(0)", *lines))
    return Walk(f"ENTRY %main (x: f32[10,100]) -> f32[10,100] {{\n{entry}\n}}\n")


def test_a_product_between_start_and_done_hides_the_exchange() -> None:
    # Half of 4000 bytes leave; 20,000 operations take longer than 8,400 bytes.
    (found,) = overlaps(_walk(START, PRODUCT, f"ROOT {DONE}"), MACHINE)
    assert (found.collective.kind, found.collective.times) == ("all-to-all", 1.0)
    assert found.seconds == pytest.approx(2.0)
    assert found.work == pytest.approx(0.02)
    assert found.share == pytest.approx(0.01)
    (found,) = overlaps(
        _walk(START, PRODUCT, f"ROOT {DONE}"), MACHINE._replace(operations={"bfloat16": 1e3})
    )
    assert found.share == 1.0


@pytest.mark.parametrize(
    "lines",
    [
        (PRODUCT, START, f"ROOT {DONE}"),
        (START, DONE, f"ROOT {PRODUCT}"),
        (
            "%d = f32[10,100] all-to-all(%x), replica_groups={{0,1}}, dimensions={0}",
            f"ROOT {PRODUCT}",
        ),
    ],
)
def test_work_that_stands_elsewhere_hides_nothing(lines: tuple[str, ...]) -> None:
    (found,) = overlaps(_walk(*lines), MACHINE)
    assert (found.seconds, found.work, found.share) == (2.0, 0.0, 0.0)


def test_on_the_sparse_cores_bytes_travel_from_the_update_on() -> None:
    inner = (
        "%inner (a: f32[10,100]) -> f32[10,100] {\n  %a = f32[10,100] parameter(0)\n"
        "  ROOT %c = f32[10,100] all-to-all(%a), replica_groups={{0,1}}, dimensions={0}\n"
        '}, execution_thread="sparsecore"\n\n'
    )
    entry = (
        "ENTRY %main (x: f32[10,100]) -> f32[10,100] {\n  %x = f32[10,100] parameter(0)\n"
        "  %s = ((), ()) custom-call-start(), called_computations={%inner}\n"
        "  %before = f32[10,10] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n"
        "  %u = ((), ()) custom-call-update(%s, %x)\n"
        f"  {PRODUCT}\n"
        "  ROOT %d = f32[10,100] custom-call-done(%u)\n}\n"
    )
    (found,) = overlaps(Walk(inner + entry), MACHINE)
    assert found.work == pytest.approx(0.02)
    assert found.collective.asynchronous
