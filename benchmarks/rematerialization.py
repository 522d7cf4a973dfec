"""What each rematerialization policy keeps and what it computes again.

    python -m benchmarks.rematerialization [--shape=v2_lite] [--json=PATH]

`small` is the shape of `benchmarks.train_step` on this CPU; `v2_lite` is DeepSeek-V2-Lite's layers
compiled ahead of time for 64 chips of TPU v5p (expert 16, fsdp 4; one row of 4,096 tokens a chip),
which needs libtpu and no TPU. Nothing runs.

Bytes kept come from the shapes of a layer's residuals, and those of a line are what it adds to the
lines above it. They are taken at two batches, so that what does not grow with tokens (the last
tiles of experts, and gathered weights if any were kept) stands apart. Below is what the compiled
step's temporary memory grows by for each further layer, less what it grows by under `full`, plus
the input that `full` keeps; for `small` at 64 rows, where activations outweigh gradients.

Operations are counted in the compiled step. Loops over blocks of attention run as causality wants
it, and those over tiles of experts as the choices of all tokens fill them; further rounds of
dispatch do not run. "again" is the share of a forward product's operations that the backward pass
repeats.
"""

import argparse
import dataclasses
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from benchmarks import our_step, record
from configs import deepseek_v2_lite
from moe_jax import sharding
from moe_jax.config import Config, MeshConfig, ModelConfig, PrecisionConfig
from moe_jax.fields import build
from moe_jax.models.block import PRODUCTS, REMATERIALIZATION, ROUTED, Block, make_context
from moe_jax.ops import attention
from moe_jax.planning import topologies
from moe_jax.planning.compiled import Counts, Product, Walk
from moe_jax.schedules import scheduled
from moe_jax.training import step

EXCHANGES = ("all_to_all", "ragged_all_to_all")
# What a policy may keep: names, and primitives whose results it keeps.
ITEMS = {
    "MLA's latents": ("latent",),
    "attention's result, normalizers": ("attention",),
    "routing: choices and places": (
        "slots",
        *(name for name in ROUTED if name not in EXCHANGES),
    ),
    "what has come by exchange": EXCHANGES,
    "experts' gate and up products": ("expert_gate_up",),
    "other products": PRODUCTS,
}
NAMES = ("latent", "attention", "slots", "expert_gate_up")


@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
    """A model on a mesh: `rows` of `length` tokens over all devices."""

    config: Config
    mesh: jax.sharding.Mesh
    rows: int
    length: int
    rows_of_growth: int  # the batch at which memory is measured by depth
    compiler_options: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def with_layers(self, routed: int) -> Config:
        """One dense layer and so many routed ones."""
        model = dataclasses.replace(
            self.config.model, num_hidden_layers=routed + 1, first_k_dense_replace=1
        )
        return dataclasses.replace(self.config, model=model)


def small() -> Shape:
    jax.config.update("jax_platforms", "cpu")
    config = our_step.make_config("float32", dense=False)
    # Nothing runs, and XLA's own passes, which decide what is in the program, are the same.
    options = {"xla_backend_optimization_level": 0}
    return Shape(config, sharding.make_mesh(MeshConfig()), 8, 512, 64, options)


def v2_lite() -> Shape:
    topologies.prepare()
    config = build(Config, deepseek_v2_lite.get_config().to_dict())
    devices = topologies.devices("v5p:4x4x4")
    mesh = sharding.make_mesh(MeshConfig(expert=16), devices)
    return Shape(config, mesh, rows=64, length=4096, rows_of_growth=64)


def keeps(policy: Callable[..., bool], item: str) -> bool:
    """Whether a policy keeps what a name or a primitive of `ITEMS` stands for."""
    if item in NAMES:
        return policy(types.SimpleNamespace(name="name"), name=item)
    return policy(types.SimpleNamespace(name=item))


def keep_only(items: tuple[str, ...]) -> Callable[..., bool]:
    def policy(primitive, *_, **parameters) -> bool:
        return (parameters["name"] if primitive.name == "name" else primitive.name) in items

    return policy


def residual_bytes(
    model: ModelConfig,
    precision: PrecisionConfig,
    mesh: AbstractMesh,
    rows: int,
    length: int,
    policy: Callable[..., bool],
) -> int:
    """Of one routed layer, over all devices; its inputs and weights counted.

    Args:
      rows: over all devices.
    """
    with jax.sharding.use_abstract_mesh(mesh):
        block = nnx.eval_shape(lambda: Block(model, precision, routed=True, rngs=nnx.Rngs(0)))
        graphdef, variables = nnx.split(block)

        def residuals(variables, x):
            ids = jnp.ones(x.shape[:2], jnp.int32, out_sharding=sharding.BATCH)
            context = make_context(ids, ids, model, training=True)

            def layer(variables, x):
                return nnx.merge(graphdef, variables)(x, context)

            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
            return jax.vjp(layer, variables, x, has_aux=True)[1]

        split = jax.NamedSharding(mesh, sharding.BATCH)
        dims = (rows, length, model.hidden_size)
        x = jax.ShapeDtypeStruct(dims, precision.compute_dtype, sharding=split)
        kept = jax.tree.leaves(jax.eval_shape(residuals, variables, x))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def kept(shape: Shape, policy: Callable[..., bool]) -> tuple[float, float]:
    """By a layer beyond what `full` keeps: bytes a token, and bytes that do not grow with them."""

    def beyond_full(rows):
        config, mesh = shape.config, shape.mesh.abstract_mesh
        arguments = config.model, config.precision, mesh, rows, shape.length
        full = residual_bytes(*arguments, REMATERIALIZATION["full"])
        return residual_bytes(*arguments, policy) - full

    one, two = beyond_full(shape.rows), beyond_full(2 * shape.rows)
    return (two - one) / shape.tokens, 2 * one - two


@functools.cache
def compile_step(shape: Shape, routed: int, rows: int, policy: str) -> Any:
    config = shape.with_layers(routed)
    training = dataclasses.replace(config.training, rematerialization=policy)
    config = dataclasses.replace(config, training=training)
    split_rows = sharding.batch_sharding(shape.mesh)

    def placed(x):
        spec = x.sharding.spec if x.sharding else sharding.P()
        split = jax.NamedSharding(shape.mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)

    def field(dtype):
        return jax.ShapeDtypeStruct((1, rows, shape.length), dtype, sharding=split_rows)

    integers = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: field(jnp.int32) for name in integers} | {"loss_weights": field(jnp.float32)}
    with jax.set_mesh(shape.mesh):
        state = jax.tree.map(placed, jax.eval_shape(lambda: step.init_state(config)))
        jitted = jax.jit(step.make_train_step(config), donate_argnums=0)
        lowered = jitted.lower(state, batch, scheduled(config, 0))
        return lowered.compile(shape.compiler_options)


def temporary(compiled: Any) -> int:
    """Bytes of one device besides state and batch."""
    return compiled.memory_analysis().temp_size_in_bytes


def is_forward(product: Product) -> bool:
    return "transpose" not in product.op_name and "rematted" not in product.op_name


def count(shape: Shape, routed: int, text: str) -> Counts:
    model, devices = shape.config.model, shape.mesh.size
    blocks = -(-shape.length // attention.BLOCK)
    # Of the loop over the other side's blocks, in the one over blocks, whose trips are known.
    trips = {"attention/.*while.*while": (blocks + 1) / 2}
    # Tiles of experts: a loop in the loop over experts. Alone behind "moe" it would be of rounds.
    experts = "moe/.*while.*while"
    once = sum(
        product.operations * product.times
        for product in Walk(text, trips | {experts: 1.0}).counts().products
        if is_forward(product) and "moe/dispatch" in product.op_name
    )
    choices = shape.tokens // devices * model.moe.num_experts_per_tok
    needed = routed * choices * 6 * model.hidden_size * model.moe.intermediate_size
    return Walk(text, trips | {experts: needed / once}).counts()


def part_of(product: Product, shape: Shape) -> str | None:
    """The part of a layer that a product belongs to."""
    name, sizes = product.op_name, shape.config.model.attention
    if "moe/dispatch" in name:
        return "routed experts"
    if "moe/router" in name:
        return "router"
    if "shared_experts" in name or "mlp/" in name:
        return "SwiGLU, dense and shared"
    if "attention/" not in name:
        return None
    if "while" in name.split("attention/")[1]:
        return "attention itself"
    keys = sizes.num_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim) * sizes.kv_lora_rank
    ups = [keys]
    if sizes.q_lora_rank:
        query_dim = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        ups.append(sizes.num_heads * query_dim * sizes.q_lora_rank)
    tokens = shape.tokens // shape.mesh.size
    if any(product.operations == 2 * tokens * up for up in ups):
        return "MLA's up-projections"
    return "other projections of attention"


def again(counts: Counts, shape: Shape) -> dict[str, float]:
    """By part, the share of the forward pass's operations that run once more."""
    forward: dict[str, float] = {}
    repeated: dict[str, float] = {}
    for product in counts.products:
        part = part_of(product, shape)
        remat = "rematted" in product.op_name
        if part and (remat or is_forward(product)):
            total = repeated if remat else forward
            total[part] = total.get(part, 0.0) + (product.operations or 0.0) * product.times
    return {part: repeated.get(part, 0.0) / total for part, total in forward.items()}


def report_kept(shape: Shape, growth: dict[str, float]) -> None:
    """A table of what is kept of a token by each routed layer."""
    policies = list(REMATERIALIZATION)
    dtype = shape.config.precision.compute_dtype
    of_input = shape.config.model.hidden_size * jnp.dtype(dtype).itemsize
    print("\n| kept by a routed layer | bytes a token |", " | ".join(policies), "|")
    print("| --- | ---: |" + " :-: |" * len(policies))
    print(f"| its input | {of_input} |" + " x |" * len(policies))
    so_far, before = (), 0.0
    for title, items in ITEMS.items():
        so_far += items
        bytes_of_token, _ = kept(shape, keep_only(so_far))
        marks = [
            "x" if all(keeps(policy, item) for item in items) else " "
            for policy in REMATERIALIZATION.values()
        ]
        print(f"| {title} | {bytes_of_token - before:.0f} |", " | ".join(marks), "|")
        before = bytes_of_token
    whole = [kept(shape, policy) for policy in REMATERIALIZATION.values()]
    in_all = [f"{of_input + bytes_of_token:.0f}" for bytes_of_token, _ in whole]
    fixed = [f"{constant / shape.mesh.size / 2**20:.1f}" for _, constant in whole]
    grown = [f"{of_input + growth[policy] - growth['full']:.0f}" for policy in policies]
    print("| in all, bytes a token | |", " | ".join(in_all), "|")
    print("| the same, by growth of the step's memory | |", " | ".join(grown), "|")
    print("| whatever the tokens, MiB of a device | |", " | ".join(fixed), "|")


def report_again(repeated: dict[str, dict[str, float]]) -> None:
    parts = list(dict.fromkeys(part for shares in repeated.values() for part in shares))
    print("\n| computed again, share of operations |", " | ".join(repeated), "|")
    print("| --- |" + " ---: |" * len(repeated))
    for part in sorted(parts):
        shares = [f"{shares.get(part, 0.0):.2f}" for shares in repeated.values()]
        print(f"| {part} |", " | ".join(shares), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["small", "v2_lite"], default="small")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()

    shape = {"small": small, "v2_lite": v2_lite}[flags.shape]()
    few, many = 3, 7
    memory, operations, growth, repeated = {}, {}, {}, {}
    for policy in REMATERIALIZATION:
        compiled = compile_step(shape, few, shape.rows, policy)
        memory[policy] = temporary(compiled)
        counts = count(shape, few, compiled.as_text())
        operations[policy] = counts.operations
        repeated[policy] = again(counts, shape)
        rows = shape.rows_of_growth
        low, high = (temporary(compile_step(shape, n, rows, policy)) for n in (few, many))
        growth[policy] = (high - low) / (many - few) / (rows * shape.length / shape.mesh.size)

    versions = record.conditions()
    print(f"{flags.shape}, {versions['date']}, jax {versions['jax']}, flax {versions['flax']}")
    print(f"1 dense and {few} routed layers, {shape.config.precision.compute_dtype}")
    print("\n| the step, of one device |", " | ".join(memory), "|")
    print("| --- |" + " ---: |" * len(memory))
    mebibytes = [f"{value / 2**20:.0f}" for value in memory.values()]
    print("| temporary memory, MiB |", " | ".join(mebibytes), "|")
    giga = [f"{value / 1e9:.1f}" for value in operations.values()]
    print("| operations, G |", " | ".join(giga), "|")
    ratios = [f"{value / operations['none']:.3f}" for value in operations.values()]
    print("| operations, relative to `none` |", " | ".join(ratios), "|")
    report_kept(shape, growth)
    report_again(repeated)
    record.save(
        flags.json,
        shape=flags.shape,
        memory=memory,
        operations=operations,
        growth=growth,
        again=repeated,
    )


if __name__ == "__main__":
    main()
