"""One contender of `benchmarks.train_step`: arguments DTYPE and routed, dense or rate."""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contender import serve
from benchmarks.shape import SHAPE
from moe_jax import config as configs
from moe_jax import sharding
from moe_jax.planning.operations import count_parameters, training_operations
from moe_jax.schedules import scheduled
from moe_jax.training import step


def make_config(dtype: str, dense: bool) -> configs.Config:
    s = SHAPE
    routed_layers = s["layers"] - s["dense_layers"]
    active = (s["top_k"] + s["shared"]) * s["expert_ffn"]
    # All layers dense, with as many operations in all.
    twin_ffn = (s["dense_layers"] * s["dense_ffn"] + routed_layers * active) // s["layers"]
    model = configs.ModelConfig(
        vocab_size=s["vocab"],
        hidden_size=s["dim"],
        num_hidden_layers=s["layers"],
        first_k_dense_replace=s["layers"] if dense else s["dense_layers"],
        intermediate_size=twin_ffn if dense else s["dense_ffn"],
        attention=configs.AttentionConfig(
            num_heads=s["heads"],
            q_lora_rank=s["q_lora"],
            kv_lora_rank=s["kv_lora"],
            qk_nope_head_dim=s["nope"],
            qk_rope_head_dim=s["rope"],
            v_head_dim=s["value"],
        ),
        moe=configs.MoEConfig(
            num_experts=s["experts"],
            num_experts_per_tok=s["top_k"],
            num_shared_experts=s["shared"],
            intermediate_size=s["expert_ffn"],
            num_expert_groups=1,
            num_limited_groups=1,
        ),
    )
    return configs.Config(
        model=model,
        precision=configs.PrecisionConfig(compute_dtype=dtype),
        training=configs.TrainingConfig(rematerialization="none"),
    )


def train_step(dtype: str, kind: str) -> tuple[Callable[[], None], float]:
    """A function that takes a step; the operations that one needs."""
    config = make_config(dtype, kind == "dense")
    rows, length = SHAPE["batch"], SHAPE["length"]
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab"], (1, rows, length + 1))
    batch = {
        "tokens": tokens[..., :-1].astype(np.int32),
        "targets": tokens[..., 1:].astype(np.int32),
        "segment_ids": np.ones((1, rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (1, rows, 1)),
        "loss_weights": np.ones((1, rows, length), np.float32),
    }
    mesh = sharding.make_mesh(configs.MeshConfig())
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: step.init_state(config))()
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        values = scheduled(config, 0)
        jitted = jax.jit(step.make_train_step(config), donate_argnums=0)
        compiled = jitted.lower(state, placed, values).compile()

    def run():
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, placed, values))

    count = count_parameters(state["parameters"], state["router_bias"], config.model)
    return run, training_operations(config.model, count, length) * rows * length


def matrix_product(dtype: str) -> tuple[Callable[[], None], float]:
    """A function that multiplies large matrices; its operations."""
    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda a, b: a @ b)

    def run():
        for _ in range(8):
            product(x, x).block_until_ready()

    return run, 8 * 2.0 * 2048**3


def main() -> None:
    dtype, kind = sys.argv[1:]
    run, operations = matrix_product(dtype) if kind == "rate" else train_step(dtype, kind)
    serve(run, {"operations": operations})


if __name__ == "__main__":
    main()
