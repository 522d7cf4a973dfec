"""One contender: MaxText's trainer on its DeepSeek decoder, with AdamW.

Arguments: the dtype of activations, and the experts' form: "dropping" (capacity 1.25), "dense"
(dropless: every expert on every token) or "ragged" (dropless: `jax.lax.ragged_dot`).
"""

import importlib.metadata
import os
import sys
import tempfile

os.environ |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}

import jax
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils

from benchmarks.contender import serve
from benchmarks.shape import SHAPE

EXPERTS = {
    "dropping": dict(sparse_matmul=False, capacity_factor=1.25),
    "dense": dict(sparse_matmul=False, capacity_factor=-1.0),
    "ragged": dict(sparse_matmul=True, megablox=False, capacity_factor=-1.0),
}


def make_config(dtype: str, experts: str) -> pyconfig.HyperParameters:
    s = SHAPE
    fields = dict(
        run_name="benchmark",
        base_output_directory=tempfile.mkdtemp(),
        hardware="cpu",
        dataset_type="synthetic",
        enable_checkpointing=False,
        skip_jax_distributed_system=True,
        log_config=False,
        steps=1_000_000,
        per_device_batch_size=s["batch"],
        max_target_length=s["length"],
        dtype=dtype,
        attention="dot_product",
        remat_policy="none",  # nothing computed again: its fastest
        decoder_block="deepseek",
        vocab_size=s["vocab"],
        base_emb_dim=s["dim"],
        base_num_decoder_layers=s["layers"],
        first_num_dense_layers=s["dense_layers"],
        base_num_query_heads=s["heads"],
        base_num_kv_heads=s["heads"],
        base_mlp_dim=s["dense_ffn"],
        base_moe_mlp_dim=s["expert_ffn"],
        mlp_activations=["silu", "linear"],
        attention_type="mla",
        q_lora_rank=s["q_lora"],
        kv_lora_rank=s["kv_lora"],
        qk_nope_head_dim=s["nope"],
        qk_rope_head_dim=s["rope"],
        v_head_dim=s["value"],
        num_experts=s["experts"],
        num_experts_per_tok=s["top_k"],
        shared_experts=s["shared"],
        routed_score_func="sigmoid",
        routed_bias=True,
        routed_scaling_factor=2.5,
        **EXPERTS[experts],
    )
    return pyconfig.initialize(**fields)


def main() -> None:
    dtype, experts = sys.argv[1:]
    config = make_config(dtype, experts)
    # As its `train_loop` begins.
    _, _, shardings, _, mesh, _, _, loader, _, _, state = train_utils.setup_train_loop(config, None)
    graphdef, state = nnx.split(state)
    parameters, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graphdef, mesh, state, shardings, train.train_step, params_shardings=parameters
    )
    batch = loader.load_next_batch()

    def run():
        nonlocal state
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    versions = {name: importlib.metadata.version(name) for name in ("maxtext", "jax")}
    serve(run, versions)


if __name__ == "__main__":
    main()
