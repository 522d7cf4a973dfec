"""The walk over compiled programs: hand counts, XLA's own where they are right, and scans."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.planning.compiled import Collective, Counts, Walk
from moe_jax.planning.hlo import Array


def _text(function: Callable, *arguments: Any) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def _counts(function: Callable, *arguments: Any, **options: Any) -> Counts:
    return Walk(_text(function, *arguments), **options).counts()


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_one_product_by_hand() -> None:
    counts = _counts(lambda a, b: a @ b, _array(8, 16), _array(16, 32))
    assert counts.operations == 2 * 8 * 16 * 32
    assert counts.product_bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    assert (counts.collectives, counts.loops, counts.not_counted) == ([], [], [])


@pytest.mark.parametrize(
    ("equation", "a", "b", "operations"),
    [
        ("bij,bjk->bik", (3, 5, 7), (3, 7, 11), 2 * 3 * 5 * 7 * 11),
        ("ijb,kjb->bik", (5, 7, 3), (11, 7, 3), 2 * 3 * 5 * 7 * 11),
        ("abij,jab->ai", (2, 3, 5, 7), (7, 2, 3), 2 * 2 * 3 * 5 * 7),
    ],
)
def test_products_with_several_dims(
    equation: str, a: tuple[int, ...], b: tuple[int, ...], operations: int
) -> None:
    counts = _counts(functools.partial(jnp.einsum, equation), _array(*a), _array(*b))
    assert counts.operations == operations


def _layers(x: jax.Array, weights: jax.Array) -> jax.Array:
    for weight in weights:
        x = jax.nn.relu(x @ weight)
    return x


def _scanned(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, weight: (jax.nn.relu(x @ weight), None), x, weights)[0]


def test_a_straight_program_has_the_products_of_cost_analysis() -> None:
    def gradient(x, weights):
        return jax.grad(lambda *arguments: jnp.sum(_layers(*arguments)), argnums=(0, 1))(x, weights)

    compiled = jax.jit(gradient).lower(_array(64, 128), _array(3, 128, 128)).compile()
    operations = Walk(compiled.as_text()).counts().operations
    # cost_analysis adds the operations on single entries, which are few here.
    assert operations == 9 * 2 * 64 * 128 * 128
    assert compiled.cost_analysis()["flops"] == pytest.approx(operations, rel=0.02)


def test_scanned_layers_count_as_often_as_they_run() -> None:
    def gradient(function):
        return jax.grad(lambda x, w: jnp.sum(function(x, w)), argnums=(0, 1))

    arguments = _array(8, 16), _array(5, 16, 16)
    scanned, straight = _counts(_scanned, *arguments), _counts(_layers, *arguments)
    assert scanned.operations == straight.operations == 5 * 2 * 8 * 16 * 16
    assert _counts(gradient(_scanned), *arguments).operations == 3 * straight.operations


def test_nested_loops_multiply() -> None:
    def nested(x, weights):
        def outer(x, _):
            return _scanned(x, weights), None

        return jax.lax.scan(outer, x, length=7)[0]

    assert _counts(nested, _array(8, 16), _array(3, 16, 16)).operations == 21 * 2 * 8 * 16 * 16


def test_trips_from_the_condition_where_the_text_gives_no_number() -> None:
    text = _text(_scanned, _array(8, 16), _array(5, 16, 16))
    assert '"known_trip_count"' in text
    without = text.replace('"known_trip_count"', '"unknown"')
    assert Walk(without).counts().operations == 5 * 2 * 8 * 16 * 16


def test_a_loop_that_the_data_bound_counts_as_expected() -> None:
    def function(x, weight, trips):
        with jax.named_scope("further_rounds"):
            return jax.lax.fori_loop(0, trips, lambda _, x: x @ weight, x)

    arguments = _array(8, 16), _array(16, 16), _array(dtype=jnp.int32)
    counts = _counts(function, *arguments)
    assert counts.operations == 0
    ((op_name, trips, times),) = counts.loops
    assert "further_rounds" in op_name
    assert (trips, times) == (None, 1)
    counts = _counts(function, *arguments, expected_trips={"another": 5, "further_rounds": 2.5})
    assert counts.operations == 2.5 * 2 * 8 * 16 * 16
    assert counts.loops[0].trips == 2.5


def test_a_conditional_counts_as_its_largest_branch() -> None:
    def function(i, x, weight):
        branches = (lambda: x, lambda: x @ weight @ weight, lambda: x @ weight)
        return jax.lax.switch(i, branches)

    counts = _counts(function, _array(dtype=jnp.int32), _array(8, 16), _array(16, 16))
    assert counts.operations == 2 * 2 * 8 * 16 * 16


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Explicit,) * 2)


def test_collectives_by_hand(mesh: Mesh) -> None:
    """Each kind on [64, 4] float32 of every device, 1024 bytes, three times in a loop."""

    def region(x):
        def body(x, _):
            gathered = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
            x = jax.lax.psum_scatter(gathered * gathered, "fsdp", tiled=True)
            x = jax.lax.all_to_all(jnp.sin(x), "expert", 0, 0, tiled=True)
            total = jax.lax.pcast(jax.lax.psum(x, "expert"), "expert", to="varying")
            x = jax.lax.ppermute(x + total, "expert", [(i, (i + 1) % 4) for i in range(4)])
            return x, None

        return jax.lax.scan(body, x, length=3)[0]

    with jax.set_mesh(mesh):
        spec = P(("fsdp", "expert"))
        x = jax.ShapeDtypeStruct((8 * 64, 4), jnp.float32, sharding=NamedSharding(mesh, spec))
        counts = _counts(jax.shard_map(region, in_specs=spec, out_specs=spec), x)
    assert {c.kind: (c.bytes, c.group, c.times) for c in counts.collectives} == {
        "all-gather": (1024, 2, 3),
        "reduce-scatter": (1024, 2, 3),
        "all-to-all": (768, 4, 3),
        "all-reduce": (2 * 768, 4, 3),
        "collective-permute": (1024, 2, 3),
    }
    assert counts.collective_bytes("all-reduce") == 3 * 2 * 768
    assert all("shard_map" in c.op_name for c in counts.collectives)


def _entry(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in ("%x = bf16[8,4]{1,0} parameter(0)", *lines))
    return f"HloModule m\n\nENTRY %main (x: bf16[8,4]) -> bf16[8,4] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,1,2,3},{4,5,6,7}}",
        "replica_groups=[2,4]<=[8]",
        "replica_groups=[2,4]<=[4,2]T(1,0)",
        "replica_groups=mesh['fsdp'=2,'expert_outer'=2,'expert'=2] {'expert_outer', 'expert'}",
        "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}",
        "replica_groups=mesh['a'=8] {'a':(1)4}",
    ],
)
def test_a_pair_of_start_and_done_counts_once_in_all_spellings_of_groups(groups: str) -> None:
    text = _entry(
        f"%s = ((bf16[8,4]{{1,0}}), bf16[8,4]{{1,0:T(8,128)(2,1)}}) all-to-all-start(%x), "
        f'channel_id=1, {groups}, dimensions={{0}}, metadata={{op_name="jit(f)/exchange"}}',
        "ROOT %d = bf16[8,4]{1,0} all-to-all-done(%s)",
    )
    assert Walk(text).counts().collectives == [
        Collective("all-to-all", "jit(f)/exchange", 48.0, 4, 1.0, True)
    ]


def test_a_ragged_exchange_fills_the_smaller_buffer() -> None:
    text = _entry(
        "%t = bf16[4,4]{1,0} parameter(1)",
        "%n = s32[4]{0} parameter(2)",
        "ROOT %r = bf16[4,4]{1,0} ragged-all-to-all(%x, %t, %n, %n, %n, %n), "
        "replica_groups=[2,4]<=[8]",
    )
    assert Walk(text).counts().collective_bytes("ragged-all-to-all") == 24


@pytest.mark.parametrize(
    ("start", "calls"),
    [
        ("custom-call", 'custom_call_target="any", called_computations={%inner}'),
        ("call", "to_apply=%inner"),
    ],
)
def test_a_collective_on_the_sparse_cores_counts_once(start: str, calls: str) -> None:
    text = _entry(
        f'%s = ((), (), s32[8]{{0}}) {start}-start(), async_execution_thread="sparsecore", {calls}',
        f"%u = ((bf16[8,4]{{1,0}}), bf16[8,4]{{1,0}}, s32[8]{{0}}) {start}-update(%s, %x)",
        f"ROOT %d = bf16[8,4]{{1,0}} {start}-done(%u)",
    ).replace(
        "ENTRY",
        "%inner (p: bf16[8,4]) -> bf16[8,4] {\n  %p = bf16[8,4]{1,0} parameter(0)\n"
        "  ROOT %a = bf16[8,4]{1,0} all-to-all(%p), replica_groups=[2,4]<=[8], dimensions={0}\n"
        '}, execution_thread="sparsecore"\n\nENTRY',
    )
    assert Walk(text).counts().collectives == [Collective("all-to-all", "", 48.0, 4, 1.0, True)]


def test_a_fusion_that_keeps_a_part_of_a_sum_is_a_reduce_scatter() -> None:
    text = _entry(
        "ROOT %f = bf16[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, "
        'metadata={op_name="jit(f)/dot_general"}'
    ).replace(
        "ENTRY",
        "%all-reduce-scatter.1 (p: bf16[8,4]) -> bf16[2,4] {\n  %p = bf16[8,4]{1,0} parameter(0)\n"
        "  %a = bf16[8,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add\n"
        "  ROOT %s = bf16[2,4]{1,0} slice(%a), slice={[0:2], [0:4]}\n}\n\nENTRY",
    )
    assert Walk(text).counts().collectives == [
        Collective("reduce-scatter", "jit(f)/dot_general", 48.0, 4, 1.0, False)
    ]


@pytest.mark.parametrize(
    ("left", "kernel", "result", "how", "operations"),
    [
        # [5, 7] times [7, 11].
        ("5,7", "7,11", "5,11", "dim_labels=bf_io->bf", 2 * 5 * 7 * 11),
        # Three products, the batch a spatial dim between dilated entries.
        (
            "3,5,7",
            "3,7,11",
            "3,5,11",
            "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            2 * 3 * 5 * 7 * 11,
        ),
        # A real convolution of 6 entries with 3 weights, padded: the ends meet two weights only.
        ("1,1,6", "1,1,3", "1,1,6", "window={size=3 pad=1_1}, dim_labels=bf0_io0->bf0", 2 * 16),
    ],
)
def test_convolutions_by_hand(
    left: str, kernel: str, result: str, how: str, operations: int
) -> None:
    text = _entry(
        f"%a = f32[{left}]{{0}} parameter(1)",
        f"%b = f32[{kernel}]{{0}} parameter(2)",
        f"ROOT %c = f32[{result}]{{0}} convolution(%a, %b), {how}",
    )
    assert Walk(text).counts().operations == operations


KERNEL = _entry(
    "ROOT %k = bf16[8,6]{1,0} custom-call(%x, %x), "
    'custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f)/grouped_matmul/pallas_call"}, '
    'backend_config={"custom_call_config":{"body":"TUz(v","cost_estimate":{"flops":"96"}}}'
)


def test_kernels_count_by_their_shapes_or_as_declared_or_are_listed() -> None:
    assert Walk(KERNEL).counts().operations == 96
    assert Walk(KERNEL).counts().product_bytes == 2 * (8 * 4 + 8 * 4 + 8 * 6)

    def by_shapes(operands: tuple[Array, ...], results: tuple[Array, ...]) -> float:
        assert [a.dims for a in operands] == [(8, 4), (8, 4)]
        return 2.0 * operands[0].dims[1] * results[0].dims[0] * results[0].dims[1]

    counts = Walk(KERNEL, kernels={"other": by_shapes, "grouped_matmul": by_shapes}).counts()
    assert counts.operations == 2 * 4 * 8 * 6
    undeclared = Walk(KERNEL.replace("cost_estimate", "cost")).counts()
    assert undeclared.operations == 0
    assert undeclared.not_counted == ["jit(f)/grouped_matmul/pallas_call"]


def test_other_custom_calls_are_no_kernels() -> None:
    text = KERNEL.replace("tpu_custom_call", "TopK").replace("cost_estimate", "cost")
    assert Walk(text).counts().products == []


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Walk("module @jit_f {}")
    with pytest.raises(ValueError, match="no replica groups"):
        Walk(_entry("ROOT %a = bf16[8,4]{1,0} all-to-all(%x), dimensions={0}")).counts()
