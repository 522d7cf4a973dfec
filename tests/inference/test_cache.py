"""The cache's size: the papers' numbers, and the arrays that are there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh

from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.inference.cache import describe
from moe_jax.inference.generation import Generator
from moe_jax.layers.cache import of_heads, values_per_token

V3 = ModelConfig(
    num_hidden_layers=61,
    attention=AttentionConfig(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
)
LLAMA3 = ModelConfig(
    num_hidden_layers=32,
    attention=AttentionConfig(
        kind="grouped_query", num_heads=32, num_key_value_heads=8, head_dim=128
    ),
)
SLOTS = 4096  # many, so that the cache is most of a program's memory


def test_what_a_token_takes_in_deepseek_v3() -> None:
    assert values_per_token(V3) == 61 * (512 + 64) == 70_272 // 2
    assert of_heads(V3, 128) == 3_997_696 // 2
    assert of_heads(V3, 8) == 249_856 // 2
    mesh = make_mesh(fsdp=4)
    assert describe(V3, 4096, 5, mesh, "bfloat16") == [
        "cache       70,272 bytes per token; 2,196.0 MiB for 8 rows of 4,096",
        "            3,997,696 bytes, 56.9x, with keys and values of all 128 heads",
        "            249,856 bytes, 3.6x, with keys and values of 8 groups of heads",
    ]


def test_what_a_token_takes_in_llama_3() -> None:
    mesh = make_mesh()
    assert describe(LLAMA3, 2, 1, mesh, "bfloat16") == [
        "cache       131,072 bytes per token; 256.0 KiB for 1 row of 2",
        "            524,288 bytes, 4.0x, with keys and values of all 32 heads",
    ]


@pytest.mark.parametrize(
    ("name", "speculative"),
    [("deep", False), ("deep", True), ("grouped query, tied, routed alone", False)],
)
def test_the_arrays_are_of_this_size_and_never_copied(
    make_model, name: str, speculative: bool
) -> None:
    model = make_model(name, fsdp=2, expert=2)
    generator = Generator(model, slots=SLOTS, speculative=speculative)
    generation = generator.start([np.array([1, 2])] * 5, 4)
    arrays = jax.tree.leaves(generation._cache)
    rows = 8  # five, and what the mesh needs
    wanted = 4 * values_per_token(model.config, speculative) * SLOTS * rows
    assert sum(array.nbytes for array in arrays) == wanted
    assert {array.dtype for array in arrays} == {jnp.dtype("float32")}
    for array in arrays:
        assert {shard.data.shape[1] for shard in array.addressable_shards} == {2}
    # A step writes to the arrays it was given, and beside them needs no second copy.
    memory = generation._advance.memory_analysis()
    assert memory.alias_size_in_bytes >= wanted // 4
    assert memory.temp_size_in_bytes < wanted // 4 // 2


def test_the_cache_is_narrow_where_products_are(make_model) -> None:
    model = make_model()
    precision = dataclasses.replace(model.precision, compute_dtype="bfloat16")
    model = type(model)(model.config, precision, model.mesh, model.parameters, model.router_bias)
    cache = Generator(model, slots=16).start([np.array([1])], 1)._cache
    assert {array.dtype for array in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
