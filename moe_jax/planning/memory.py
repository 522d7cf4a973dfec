"""Bytes that a train step takes on one device, by kind.

The state is exact: the equal parts that `sharding.py` cuts it into. So is what layers keep for the
backward pass, which comes from the shapes of JAX's own residuals. What one layer's backward pass
needs besides, and the loss, are counted from the shapes of the largest arrays that stand in memory
together; a compiler may need more (`docs/planning.md` holds compiled programs against it).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.cache import of_heads, values_per_token
from moe_jax.models.block import REMATERIALIZATION, Block, make_context
from moe_jax.ops.cross_entropy import CHUNK_LOGITS
from moe_jax.planning.case import Case
from moe_jax.planning.communication import buffer_rows

FLOAT32 = 4
Policy = Callable[..., bool]


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
    """Bytes of the arrays that outlive a step; float32, whatever the precision of products."""
    parameters = sum(w.part(case.sizes) for w in case.weights if w.trained) * FLOAT32
    biases = sum(w.part(case.sizes) for w in case.weights if not w.trained) * FLOAT32
    return {
        "parameters": parameters,
        "optimizer": 2 * parameters,
        "moving average": parameters if case.config.optimizer.ema_decay else 0,
        "router bias": biases,
    }


def gradients(case: Case) -> float:
    """The sum over micro-batches, and beside it the one that is added; float32."""
    parameters = sum(w.part(case.sizes) for w in case.weights if w.trained) * FLOAT32
    return parameters * (2 if case.micro_batches > 1 else 1)


def kept_activations(case: Case, rematerialization: str | None = None) -> float:
    """What all layers keep of a micro-batch for the backward pass.

    Args:
      rematerialization: another than the config's.
    """
    policy = rematerialization or case.config.training.rematerialization
    routed_stack = case.routed_layers > 0
    depth = case.depth * _kept_by_layer(case, routed_stack, policy)
    # Of a module that predicts ahead, its input is the last one's state, and what it keeps besides
    # are the vectors of the next tokens, where these have travelled, and their projection.
    stream = case.tokens * case.config.model.hidden_size * case.compute_bytes
    travelled = policy in ("none", "minimal") and case.sizes["fsdp"] > 1
    depth += case.depth * stream * (travelled + (policy == "none"))
    layers = sum(
        number * _kept_by_layer(case, routed, policy)
        for routed, number in ((False, case.dense_layers), (True, case.routed_layers))
        if number
    )
    return layers + depth


def _kept_by_layer(case: Case, routed: bool, policy: str) -> float:
    """Bytes of one device, the layer's input counted."""
    model, precision = case.config.model, case.config.precision
    experts = case.sizes["expert_outer"], case.sizes["expert"]
    if policy in ("full", "latent"):
        experts = 1, 1  # nothing is kept of what is routed
    arguments = model, precision, experts, case.platform, case.rows, case.length, routed
    stream = case.tokens * model.hidden_size * case.compute_bytes
    return stream + _of_device(*arguments, policy) - _of_device(*arguments, "full")


@functools.cache
def _of_device(
    model: ModelConfig,
    precision: PrecisionConfig,
    experts: tuple[int, int],
    platform: str,
    rows: int,
    length: int,
    routed: bool,
    policy: str,
) -> float:
    outer, inner = experts
    sizes = dict.fromkeys(sharding.DEVICE_ORDER, 1) | {"expert_outer": outer, "expert": inner}
    mesh, devices = sharding.abstract_mesh(sizes, platform), outer * inner
    keep = REMATERIALIZATION[policy]
    total = residual_bytes(model, precision, mesh, rows * devices, length, keep, routed=routed)
    return total / devices


def residual_bytes(
    model: ModelConfig,
    precision: PrecisionConfig,
    mesh: jax.sharding.AbstractMesh,
    rows: int,
    length: int,
    policy: Policy,
    *,
    routed: bool = True,
) -> int:
    """What JAX keeps of one layer, over all devices; its inputs and weights counted.

    Args:
      rows: over all devices.
    """
    with jax.sharding.use_abstract_mesh(mesh):
        block = nnx.eval_shape(lambda: Block(model, precision, routed=routed, rngs=nnx.Rngs(0)))
        graphdef, variables = nnx.split(block)

        def residuals(variables: Any, x: jax.Array) -> Any:
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


def _of_one_layer(case: Case) -> dict[str, float]:
    """What the backward pass of the largest layer has in memory besides what was kept before."""
    routed = case.routed_layers > 0
    policy = case.config.training.rematerialization
    whole_layer = _kept_by_layer(case, routed, "none")
    again = whole_layer - _kept_by_layer(case, routed, policy)
    stack = "moe_blocks" if routed else "dense_blocks"
    whole = 0
    for weight in case.weights:
        if weight.stack == stack and weight.trained:
            experts = [axis for axis in weight.split_over(case.sizes) if axis != "fsdp"]
            parts = sharding.num_shards(dict(case.sizes), experts)
            whole += weight.size // weight.layers // parts
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
    """A chunk of logits and their gradients, and the head whole with its gradient."""
    model = case.config.model
    head = model.vocab_size * model.hidden_size
    chunk = min(case.tokens * model.vocab_size, CHUNK_LOGITS)
    return {
        "logits": chunk * 2 * FLOAT32,
        "gathered weights": head * case.compute_bytes,
        "whole gradients": head * FLOAT32,
    }


def cache_per_token(case: Case) -> dict[str, float]:
    """Bytes that a token takes in a cache, beside other kinds of attention with the same heads."""
    model = case.config.model
    heads = model.attention.num_heads
    return {
        "this model": values_per_token(model) * case.compute_bytes,
        "all heads": of_heads(model, heads) * case.compute_bytes,
        "8 groups": of_heads(model, min(8, heads)) * case.compute_bytes,
    }
