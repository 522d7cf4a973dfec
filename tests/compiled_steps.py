"""Train steps of a small model, compiled for emulated devices, which plans are held against."""

import dataclasses
import functools
import math
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from emulated import make_mesh, quick_jit

from moe_jax import sharding, validation
from moe_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PrecisionConfig,
    Stage,
    TrainingConfig,
)
from moe_jax.planning.case import Case
from moe_jax.planning.compiled import Counts, Walk
from moe_jax.schedules import scheduled
from moe_jax.training.step import abstract_state, init_state, make_train_step

LENGTH = 64
# Sizes that divide nothing by chance; no stack of one layer, whose loop XLA would open.
CONFIG = Config(
    model=ModelConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=5,
        first_k_dense_replace=2,
        intermediate_size=160,
        max_position_embeddings=LENGTH,
        attention=AttentionConfig(
            num_heads=4,
            q_lora_rank=48,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=24,
        ),
        moe=MoEConfig(
            num_experts=16,
            num_experts_per_tok=4,
            num_shared_experts=1,
            intermediate_size=40,
            num_expert_groups=4,
            num_limited_groups=2,
            buffer_factor=4.0,  # one round holds all that may come
        ),
    ),
    # In bfloat16, XLA's collectives on CPU would send float32 all the same.
    precision=PrecisionConfig(compute_dtype="float32"),
    optimizer=OptimizerConfig(ema_decay=0.9),
    data=DataConfig(num_streams=1, stages=(Stage(sequence_length=LENGTH),)),
)


def make_config(
    rows: int,
    micro_batches: int,
    rematerialization: str,
    depth: int = 0,
    parts: int = 1,
    recipe: str = "none",
    **mesh: int,
) -> Config:
    """`rows` of each device and micro-batch."""
    training = TrainingConfig(
        tokens_per_step=rows * math.prod(mesh.values()) * micro_batches * LENGTH,
        micro_batches=micro_batches,
        rematerialization=rematerialization,
    )
    return dataclasses.replace(
        CONFIG,
        mesh=MeshConfig(**{"fsdp": 1, **mesh}),
        model=dataclasses.replace(
            CONFIG.model,
            num_nextn_predict_layers=depth,
            moe=dataclasses.replace(CONFIG.model.moe, exchange_parts=parts),
        ),
        training=training,
        precision=dataclasses.replace(CONFIG.precision, recipe=recipe),
    )


def state_of(config: Config) -> Any:
    mesh = _mesh(config)
    with jax.set_mesh(mesh):
        return abstract_state(config, mesh)


def tiny() -> Config:
    """configs/tiny.py, in float32."""
    file = Path(validation.__file__).parents[1] / "configs" / "tiny.py"
    config = validation.parse(runpy.run_path(str(file))["get_config"]())
    return dataclasses.replace(config, precision=CONFIG.precision)


def init(config: Config) -> Any:
    """The state, its arrays on the emulated devices."""
    with jax.set_mesh(_mesh(config)):
        return quick_jit(lambda: init_state(config))()


def case_of(config: Config) -> Case:
    return Case.of(config, _mesh(config).size)


def _mesh(config: Config) -> jax.sharding.Mesh:
    sizes = {axis: getattr(config.mesh, axis) for axis in sharding.BATCH_AXES}
    return make_mesh(**sizes)


@functools.cache
def counts_of(config: Config) -> Counts:
    """Of one device. Routing is balanced and of one round."""
    mesh, case = _mesh(config), case_of(config)
    with jax.set_mesh(mesh):
        shape = (case.micro_batches, case.rows * mesh.size, case.length)

        def field(dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))

        integers = ("tokens", "targets", "segment_ids", "positions")
        batch = {name: field(jnp.int32) for name in integers}
        batch["loss_weights"] = field(jnp.float32)
        step = quick_jit(make_train_step(config), donate_argnums=0)
        text = step.lower(state_of(config), batch, scheduled(config, 0)).compile().as_text()
    # Of an expert's tiles, in pieces: as many of the largest as its load fills, and so on.
    experts = math.prod(mesh.shape[axis] for axis in sharding.EXPERT_AXES)
    moe = config.model.moe
    left = case.tokens // case.parts * experts * moe.num_experts_per_tok / moe.num_experts
    trips = {r"further_rounds\)*/cond/branch_1_fun/while$": 0.0}
    for size in sorted({int(n) for n in re.findall(r"/pieces_of_(\d+)/", text)}, reverse=True):
        trips[f"/pieces_of_{size}/while$"], left = divmod(left, size)
    assert left == 0, "a load that fills whole tiles"
    return Walk(text, trips).counts()


# What plans are held against: each rematerialization once but for `minimal`, micro-batches,
# prediction ahead, tokens that travel in parts, all four axes.
HELD = {
    "tiny": tiny(),
    "none": make_config(2, 2, "none", data=2, expert_outer=2, expert=2),
    "latent": make_config(2, 1, "latent", depth=2, fsdp=2, expert=4),
    "full": make_config(2, 1, "full", parts=2, fsdp=2, expert=4),
    "fp8": make_config(2, 1, "none", recipe="fp8_block", fsdp=2, expert=4),
}
