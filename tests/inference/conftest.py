"""Tiny models with random weights, of every kind that differs in generation."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest
from emulated import make_mesh
from flax import nnx

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, PrecisionConfig
from moe_jax.models.decoder import Decoder, RouterBias
from moe_jax.models.language_model import LanguageModel

SIZES = dict(
    num_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=6,
    num_key_value_heads=2,
    head_dim=4,
)
LATENT = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=24,
    initializer_range=0.4,  # text that does not repeat one token
    num_nextn_predict_layers=1,
    attention=AttentionConfig(**SIZES),
    moe=MoEConfig(
        num_experts=4,
        num_experts_per_tok=2,
        intermediate_size=8,
        num_expert_groups=2,
        num_limited_groups=1,
    ),
)
CONFIGS = {
    "latent": LATENT,
    "latent, queries not compressed": dataclasses.replace(
        LATENT, attention=AttentionConfig(**SIZES | {"q_lora_rank": None})
    ),
    "grouped query, tied, routed alone": dataclasses.replace(
        LATENT,
        first_k_dense_replace=0,
        tie_word_embeddings=True,
        attention=AttentionConfig(**SIZES | {"kind": "grouped_query"}),
    ),
    "dense": dataclasses.replace(LATENT, first_k_dense_replace=3),
    "few words": dataclasses.replace(LATENT, vocab_size=3),  # drafts are often right
    "deep": dataclasses.replace(LATENT, num_hidden_layers=12),
}
MakeModel = Callable[..., LanguageModel]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """(name of a config, size of each mesh axis) -> the model, the same weights on every mesh."""
    made: dict[tuple, LanguageModel] = {}

    def make(name: str = "latent", **sizes: int) -> LanguageModel:
        key = (name, *sorted(sizes.items()))
        if key not in made:
            made[key] = _make(CONFIGS[name], sizes or {"fsdp": 1})
        return made[key]

    return make


def _make(config: ModelConfig, sizes: dict[str, int]) -> LanguageModel:
    precision = PrecisionConfig(compute_dtype="float32")
    mesh = make_mesh(**sizes)

    def init():
        _, parameters, bias = nnx.split(
            Decoder(config, precision, rngs=nnx.Rngs(0)), nnx.Param, RouterBias
        )
        return nnx.to_pure_dict(parameters), nnx.to_pure_dict(bias)

    with jax.set_mesh(mesh):
        parameters, bias = jax.jit(init)()
        # A bias that matters: a routing that forgot it would choose others.
        bias = jax.tree.map(lambda b: b + 0.3 * (np.arange(b.shape[-1]) % 2), bias)
    return LanguageModel(config, precision, mesh, parameters, bias)
