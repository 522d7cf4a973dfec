"""The decoder, against Hugging Face transformers' DeepSeek-V3 on the same weights.

make_deepseek_v3_reference.py says how the stored numbers came about.
"""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import AttentionConfig, MeshConfig, ModelConfig, MoEConfig, PrecisionConfig
from moe_jax.models.decoder import Decoder, RouterBias
from moe_jax.ops.cross_entropy import cross_entropy

REFERENCE = Path(__file__).with_name("deepseek_v3_reference.npz")
SETTINGS = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=48,
    max_position_embeddings=64,
    rms_norm_eps=1e-3,
    attention=AttentionConfig(
        num_heads=4,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=10,
        rope_theta=100.0,
    ),
    moe=MoEConfig(
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=1,
        intermediate_size=16,
        num_expert_groups=2,
        num_limited_groups=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
)
HEADS, NOPE, ROPE, V = 4, 8, 4, 10


def _attention(layer: dict[str, np.ndarray]) -> dict:
    def linear(name: str, *shape: int) -> dict:
        weight = layer[f"self_attn.{name}.weight"].T
        return {"weight": weight.reshape(shape) if shape else weight}

    return {
        "query_down": linear("q_a_proj"),
        "query_norm": {"scale": layer["self_attn.q_a_layernorm.weight"]},
        "query_up": linear("q_b_proj", -1, HEADS, NOPE + ROPE),
        "kv_down": linear("kv_a_proj_with_mqa"),
        "kv_norm": {"scale": layer["self_attn.kv_a_layernorm.weight"]},
        "kv_up": linear("kv_b_proj", -1, HEADS, NOPE + V),
        "output": linear("o_proj", HEADS, V, -1),
    }


def _swiglu(layer: dict[str, np.ndarray], prefix: str) -> dict:
    return {
        name: {"weight": layer[f"{prefix}.{name}_proj.weight"].T} for name in ("gate", "up", "down")
    }


def _block(layer: dict[str, np.ndarray], routed: bool) -> dict:
    block = {
        "attention_norm": {"scale": layer["input_layernorm.weight"]},
        "attention": _attention(layer),
        "mlp_norm": {"scale": layer["post_attention_layernorm.weight"]},
    }
    if not routed:
        return block | {"mlp": _swiglu(layer, "mlp")}
    gate, up = np.split(layer["mlp.experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
    moe = {
        "router": {"weight": layer["mlp.gate.weight"].T},
        "gate": gate,
        "up": up,
        "down": layer["mlp.experts.down_proj"].swapaxes(1, 2),
        "shared": _swiglu(layer, "mlp.shared_experts"),
    }
    return block | {"moe": moe}


def _weights(reference: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Parameters and router biases under our names."""

    def layer(i: int) -> dict[str, np.ndarray]:
        prefix = f"model.layers.{i}."
        return {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}

    def stack(*blocks: dict) -> dict:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)

    biases = np.stack([layer(i)["mlp.gate.e_score_correction_bias"] for i in (1, 2)])
    params = {
        "embedding": {"weight": reference["model.embed_tokens.weight"]},
        "dense_blocks": stack(_block(layer(0), routed=False)),
        "moe_blocks": stack(_block(layer(1), routed=True), _block(layer(2), routed=True)),
        "norm": {"scale": reference["model.norm.weight"]},
        "head": {"weight": reference["lm_head.weight"].T},
    }
    return params, {"moe_blocks": {"moe": {"router": {"bias": biases}}}}


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 2, "expert": 2}], ids=str)
def test_logits_and_loss_equal_the_reference(sizes: dict[str, int]) -> None:
    with np.load(REFERENCE) as file:
        reference = dict(file)
    mesh = sharding.make_mesh(
        MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))]
    )
    with jax.set_mesh(mesh):
        precision = PrecisionConfig(compute_dtype="float32")
        model = nnx.eval_shape(lambda: Decoder(SETTINGS, precision, rngs=nnx.Rngs(0)))
        graphdef, *shapes = nnx.split(model, nnx.Param, RouterBias)
        shapes = [nnx.to_pure_dict(state) for state in shapes]
        weights = list(_weights(reference))
        chex.assert_trees_all_equal_shapes(weights, shapes)
        params, bias = jax.tree.map(
            lambda weight, shape: jax.device_put(
                weight, jax.NamedSharding(mesh, shape.sharding.spec)
            ),
            weights,
            shapes,
        )
        tokens = jax.device_put(reference["tokens"], jax.NamedSharding(mesh, sharding.BATCH))

        @jax.jit
        def run(params, bias, tokens):
            logits = nnx.merge(graphdef, params, bias)(tokens)
            targets = jnp.roll(tokens, -1, axis=1)
            weights = jnp.broadcast_to(
                jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1, tokens.shape
            )
            total = cross_entropy(logits, targets, weights.astype(jnp.float32))
            return logits, total / (tokens.shape[0] * (tokens.shape[1] - 1))

        logits, loss = run(params, bias, tokens)
    chex.assert_type([logits, loss], jnp.float32)
    spread = float(np.std(reference["logits"]))
    chex.assert_trees_all_close(logits, reference["logits"], rtol=0, atol=1e-4 * spread)
    chex.assert_trees_all_close(loss, reference["loss"], rtol=1e-5)
