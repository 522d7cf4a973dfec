"""Bytes that a train step takes on one device, by kind.

The state is exact: the equal parts that `sharding.py` cuts it into. What layers keep for the
backward pass follows `models/block.py`, item by item. What one layer's backward pass needs besides,
and the loss, are the largest arrays that stand in memory together; a compiler may need more
(`docs/planning.md` holds compiled programs against it).
"""

import math

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.config import ModelConfig
from moe_jax.layers.cache import of_heads, values_per_token
from moe_jax.ops.backends import Backends, choose
from moe_jax.ops.cross_entropy import CHUNK_LOGITS
from moe_jax.ops.fp8_recipes import RECIPES
from moe_jax.ops.grouped_matmul import tile_size
from moe_jax.planning.case import Case
from moe_jax.planning.communication import buffer_rows, returned_rows
from moe_jax.sharding import EXPERT_AXES

FLOAT32 = INT32 = 4
# Of a device's memory. What is estimated here is off by as much (docs/planning.md).
USABLE = 0.9


def memory(case: Case) -> dict[str, float]:
    """Bytes of one device at the peak of a step, by kind.

    The loss and the last layer's backward pass are both in it: compilers begin the one while the
    head's gradient of the other is still on its way.
    """
    kinds = state(case) | {
        "gradients": gradients(case),
        "kept activations": kept_activations(case),
    }
    for name, size in (*_of_loss(case).items(), *_of_one_layer(case).items()):
        kinds[name] = kinds.get(name, 0.0) + size
    return kinds


def state(case: Case) -> dict[str, float]:
    """Bytes of the arrays that outlive a step; float32, but for moments as the config has them."""
    parameters = _parts(case, trained=True)
    return {
        "parameters": parameters,
        "optimizer": 2 * parameters * case.moment_bytes / FLOAT32,
        "moving average": parameters if case.config.optimizer.ema_decay else 0.0,
        "router bias": _parts(case, trained=False),
    }


def gradients(case: Case) -> float:
    """The sum over micro-batches, and beside it the one that is added; float32."""
    return _parts(case, trained=True) * (2 if case.micro_batches > 1 else 1)


def kept_activations(case: Case) -> float:
    """What all layers keep of a micro-batch for the backward pass."""
    policy, routed_stack = case.config.training.rematerialization, case.routed_layers > 0
    layers = case.dense_layers * kept_by_layer(case, False, policy)
    layers += case.routed_layers * kept_by_layer(case, True, policy)
    # A module that predicts ahead ends in a norm, for which what comes back to it is kept as well,
    # and begins with vectors of the next tokens, where these have travelled, and their projection.
    stream = case.tokens * case.config.model.hidden_size * case.compute_bytes
    of_module = kept_by_layer(case, routed_stack, policy)
    if policy in ("none", "minimal"):
        of_module += stream * (case.sizes["fsdp"] > 1)
        returned = sum(returned_rows(case)) if routed_stack else 0.0
        of_module += returned * case.config.model.hidden_size * case.combine_bytes
    if policy == "none":
        last = not routed_stack or case.config.model.moe.num_shared_experts > 0
        of_module += stream * (1 + last)
    return layers + case.depth * of_module


def _parts(case: Case, *, trained: bool) -> float:
    """Bytes of this device's parts of weights; router biases are not trained."""
    return FLOAT32 * float(sum(w.part(case.sizes) for w in case.weights if w.trained == trained))


# What each policy keeps, by the names of `layer_items`.
KEPT = {
    "full": ("input",),
    "latent": ("input", "latents", "attention"),
    "minimal": ("input", "latents", "attention", "routing", "exchange"),
    "none": ("input", "latents", "attention", "routing", "exchange", "experts", "products"),
}


def kept_by_layer(case: Case, routed: bool, policy: str) -> float:
    """Bytes of one device, the layer's input counted."""
    items = layer_items(case, routed)
    return sum(items[name] for name in KEPT[policy])


def layer_items(case: Case, routed: bool) -> dict[str, float]:
    """What a layer may keep of a micro-batch, in bytes of one device.

    latents: MLA's, with the rotary key.
    attention: its result and its normalizers.
    routing: choices, and the places of rows.
    exchange: rows that have come to the device's experts, with their choices.
    experts: the results of gate and up, in tiles.
    products: the results of all others but the feed-forward part's last, which nothing asks for.
    """
    model, tokens, size = case.config.model, float(case.tokens), case.compute_bytes
    attention, moe, dim = model.attention, model.moe, model.hidden_size
    heads = attention.num_heads
    if attention.kind == "latent":
        latents = attention.kv_lora_rank + attention.qk_rope_head_dim
        latents += attention.q_lora_rank or 0
        value = attention.v_head_dim
        query = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
        key_value = heads * (attention.qk_nope_head_dim + value)
    else:
        latents, value = 0, attention.head_dim
        query, key_value = heads * value, 2 * attention.num_key_value_heads * value
    # With a recipe, the stream behind attention and SwiGLU's inputs (`block.KEPT_IN_FP8`).
    gate_up = case.operand_bytes("mlp")
    products = size * (dim if case.fp8 else query + key_value + dim)
    items = {
        "input": tokens * dim * size,
        "latents": tokens * latents * size,
        "attention": tokens * heads * (value * size + FLOAT32),
        "routing": 0.0,
        "exchange": 0.0,
        "experts": 0.0,
    }
    if routed:
        top_k, slots = moe.num_experts_per_tok, expert_slots(case)
        items["routing"] = ((tokens + _rows_here(case)) * top_k + slots) * INT32
        items["exchange"] = sum(buffer_rows(case)) * (case.row_bytes(size) + 2 * top_k * FLOAT32)
        if len(returned := returned_rows(case)) == 2:
            # A barrier holds a part's results together with the next part's rows.
            tied = returned[1] * (case.parts - 1) / case.parts
            items["exchange"] += tied * dim * case.combine_bytes
        kept = case.operand_bytes("experts")
        items["experts"] = slots * 2 * moe.intermediate_size * kept
        shared = moe.num_shared_experts * moe.intermediate_size
        products += 2 * shared * gate_up + (0 if case.fp8 else moe.num_experts * FLOAT32)
    else:
        products += 2 * model.intermediate_size * gate_up
    return items | {"products": tokens * products}


def expert_slots(case: Case) -> int:
    """Rows of all tiles of this device's experts (`ops/dispatch.py`)."""
    moe, devices = case.config.model.moe, sharding.num_shards(case.sizes, EXPERT_AXES)
    here, rows = moe.num_experts // devices, _rows_here(case) // case.parts
    load = case.tokens // case.parts * devices * moe.num_experts_per_tok / moe.num_experts
    tile = tile_size(load, _backends(case))
    most = rows * moe.num_experts_per_tok // tile + min(rows * moe.num_experts_per_tok, here)
    tiles = min(most, math.ceil(moe.buffer_factor * here * load / tile) + here)
    return case.parts * tile * tiles


def _rows_here(case: Case) -> int:
    """That have come to the device's experts, or are there."""
    return round((buffer_rows(case) or [case.tokens])[-1])


def _backends(case: Case) -> Backends:
    """The forms of operations on the platform."""
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(case.sizes, case.platform)):
        precision = case.config.precision
        chosen = choose(case.config.model, jnp.dtype(precision.compute_dtype))
        return chosen._replace(recipe=RECIPES.get(precision.recipe_of("experts")))


def _of_one_layer(case: Case) -> dict[str, float]:
    """What the backward pass of the largest layer has in memory besides what was kept before."""
    routed = case.routed_layers > 0
    policy = case.config.training.rematerialization
    whole_layer = kept_by_layer(case, routed, "none")
    again = whole_layer - kept_by_layer(case, routed, policy)
    stack = "moe_blocks" if routed else "dense_blocks"
    whole = 0
    for weight in case.weights:
        if weight.stack == stack and weight.trained:
            whole += weight.gathered(case.sizes) // weight.layers
    return {
        "layer activations": again + whole_layer,  # and their gradients
        "gathered weights": whole * case.compute_bytes,
        "whole gradients": whole * FLOAT32,
        "dispatch buffers": dispatch_buffers(case) if routed else 0.0,
    }


def dispatch_buffers(case: Case) -> float:
    """Rows that have come to this device's experts, and their results on the way back."""
    row = case.config.model.hidden_size * (case.compute_bytes + case.combine_bytes)
    return sum(buffer_rows(case)) * row


def _of_loss(case: Case) -> dict[str, float]:
    """A chunk of logits and their gradients, and the head whole with its gradient.

    The gradient of a head that is not split is among the gradients already.
    """
    model = case.config.model
    head = model.vocab_size * model.hidden_size
    weight = next(w for w in reversed(case.weights) if w.group in ("head", "embedding"))
    chunk = min(case.tokens * model.vocab_size, CHUNK_LOGITS)
    return {
        "logits": chunk * 2 * FLOAT32,
        "gathered weights": head * case.compute_bytes,
        "whole gradients": head * FLOAT32 if weight.part(case.sizes) < head else 0.0,
    }


def cache_per_token(model: ModelConfig, itemsize: int) -> dict[str, int]:
    """Bytes of a token in a cache, beside keys and values of all heads, and of 8 groups of them."""
    heads = model.attention.num_heads
    return {
        "own": values_per_token(model) * itemsize,
        "all_heads": of_heads(model, heads) * itemsize,
        "8_groups": of_heads(model, 8) * itemsize,
    }
