"""One training step: loss, gradients, update, router-bias update. Pure functions of plain trees.

The state is nested dicts of arrays:
  parameters: float32, named as the model names them, stacked [layers, ...].
  router_bias: [layers, experts] float32 in a tree of the model's names; empty without biases.
  optimizer: {"mu", "nu"}, each like parameters.
  ema: like parameters; only if the config asks for it.
  step: [] int32, batches seen; it advances on a skipped update.
  fp8: [layers, 3, ...] float32 in a tree of the model's names, what products in eight bits remember
    (`ops/fp8_state.py`); only if the recipe has it so.
  update: [] int32, updates made; it drives the moments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moe_jax import sharding
from moe_jax.config import Config, Stage
from moe_jax.curriculum import micro_batches, num_rows
from moe_jax.layers.linear import Fp8State
from moe_jax.models.decoder import Decoder, RouterBias, RoutingStats
from moe_jax.models.multi_token_prediction import reaches, shifted
from moe_jax.ops import balance, fp8_state
from moe_jax.training.optimizer import AdamW

Tree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_model(config: Config) -> Decoder:
    """The model with its initial parameters; under `jax.eval_shape`, their shapes alone."""
    return Decoder(
        config.model,
        config.precision,
        rematerialization=config.training.rematerialization,
        rngs=nnx.Rngs(config.seed),
    )


def graph(config: Config) -> nnx.GraphDef:
    """The model without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: make_model(config)))


def batch_shape(config: Config, stage: Stage) -> tuple[int, int, int]:
    """[micro_batches, rows, length] of a global batch in this stage."""
    parts = micro_batches(config, stage)
    return parts, num_rows(config, stage) // parts, stage.sequence_length


def abstract_batch(config: Config, stage: Stage, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a global batch in this stage."""
    shape, split = batch_shape(config, stage), sharding.batch_sharding(mesh)
    integers = ("tokens", "targets", "segment_ids", "positions")
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        for name, dtype in (*((n, jnp.int32) for n in integers), ("loss_weights", jnp.float32))
    }


def abstract_state(config: Config, mesh: Mesh) -> Tree:
    """Shapes, dtypes and shardings of a state, on the current mesh, without making one."""

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A value that no axis splits has no sharding of its own here.
        spec = x.sharding.spec if x.sharding else sharding.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(lambda: init_state(config)))


def init_state(config: Config) -> Tree:
    """The state before the first step. Jit it, so that each device makes its own part only."""
    _, parameters, router_bias, _ = nnx.split(make_model(config), nnx.Param, RouterBias, Fp8State)
    return first_state(config, nnx.to_pure_dict(parameters), nnx.to_pure_dict(router_bias))


def first_state(config: Config, parameters: Tree, router_bias: Tree) -> Tree:
    """The state before the first step, of these weights."""
    state = {
        "parameters": parameters,
        "router_bias": router_bias,
        "optimizer": AdamW(config.optimizer).init(parameters),
        "step": jnp.zeros((), jnp.int32),
        "update": jnp.zeros((), jnp.int32),
    }
    if config.precision.fp8_state:
        shapes = nnx.state(nnx.eval_shape(lambda: make_model(config)), Fp8State)
        state["fp8"] = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(shapes))
    if config.optimizer.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, parameters)
    return state


def make_train_step(config: Config) -> Callable[[Tree, Batch, Metrics], tuple[Tree, Metrics]]:
    """The function (state, batch, scheduled) -> (state, metrics).

    A batch is a dict of [micro_batches, rows, length] arrays (`data.loader`), and `scheduled` the
    values that change as tokens are seen (`schedules.scheduled`), [] float32 each. The loss of each
    micro-batch is divided by the loss weights of the whole global batch, and its balance losses by
    the batch's rows or micro-batches, so gradients, which add in float32, do not depend on how
    sequences were shared out.
    """
    graphdef = graph(config)
    optimizer = AdamW(config.optimizer)

    def loss_fn(trained, router_bias, batch, scale):
        """The micro-batch's part of the objective; its parts by name; the routing of its tokens."""
        model = nnx.merge(graphdef, *trained, router_bias)
        inputs = (batch["tokens"], batch["segment_ids"], batch["positions"])
        hidden, stats = model.hidden_states(*inputs, training=True)
        loss = model.loss(hidden, batch["targets"], batch["loss_weights"])
        losses = {"loss": loss * scale.token}
        objective, routed = losses["loss"], {}
        if stats is not None:
            routed["moe_blocks"] = stats
            losses |= _balance_losses(stats, scale, config)
        if config.model.num_nextn_predict_layers:
            ahead = model.predict_ahead(hidden, *inputs, training=True)
            losses["mtp_loss"] = _ahead_loss(model, ahead.hidden_KBLD, batch) * scale.token
            if ahead.stats is not None:
                routed["mtp"] = ahead.stats
                for name, value in _balance_losses(ahead.stats, scale, config).items():
                    losses[name] += value
        for name, value in losses.items():
            if name != "loss":
                objective += scale.weights[f"{name}_weight"] * value
        return objective, (losses, routed)

    def gradients(state, batch, scheduled):
        micro_batches, rows, _ = batch["tokens"].shape
        scale = Scale(
            token=1.0 / jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0),
            sequence=1.0 / (micro_batches * rows),
            micro_batch=1.0 / micro_batches,
            weights=scheduled,
        )

        def micro_step(total, micro_batch):
            trained = state["parameters"], state.get("fp8", {})
            (_, aux), (grads, reports) = jax.value_and_grad(loss_fn, has_aux=True)(
                trained, state["router_bias"], micro_batch, scale
            )
            return jax.tree.map(jnp.add, total, grads), (aux, reports)

        zeros = jax.tree.map(jnp.zeros_like, state["parameters"])
        grads, ((losses, routed), reports) = jax.lax.scan(micro_step, zeros, batch)
        return grads, jax.tree.map(jnp.sum, losses), routed, fp8_state.combined(reports)

    def train_step(state, batch, scheduled):
        grads, losses, routed, reports = gradients(state, batch, scheduled)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            parameters, moments = optimizer.update(
                grads,
                state["optimizer"],
                state["parameters"],
                state["update"],
                scheduled["learning_rate"],
            )
        # Over micro-batches; the mesh's devices are summed already.
        loads = {name: jnp.sum(stats.load_E, axis=0) for name, stats in routed.items()}
        new = {
            "parameters": parameters,
            "optimizer": moments,
            "router_bias": {
                name: jax.tree.map(
                    lambda bias, load=loads[name]: balance.update_bias(
                        bias, load, scheduled["bias_update_speed"]
                    ),
                    biases,
                )
                for name, biases in state["router_bias"].items()
            },
            "update": state["update"] + 1,
        }
        tokens = batch["segment_ids"]
        metrics = {
            **losses,
            "grad_norm": grad_norm,
            "packing_efficiency": jnp.sum(tokens > 0) / tokens.size,
        }
        if "moe_blocks" in routed:
            violation_L = balance.max_violation(loads["moe_blocks"])
            metrics |= {
                "max_violation": jnp.mean(violation_L),
                "max_violation_worst_layer": jnp.max(violation_L),
                "dispatch_rounds": jnp.max(routed["moe_blocks"].rounds),
                "first_router_not_finite": _first_not_finite(routed["moe_blocks"].z),
                "expert_load": loads["moe_blocks"],  # [layers, experts] int32
                "router_entropy": balance.entropy(jnp.sum(routed["moe_blocks"].share_E, axis=0)),
            }
        dropped = [jnp.sum(stats.dropped) for stats in routed.values()]
        metrics["dropped_tokens"] = sum(dropped, start=jnp.zeros((), jnp.int32))
        if "fp8" in state:
            bound = config.precision.fp8_error_bound
            new["fp8"] = fp8_state.updated(state["fp8"], reports, bound)
        if config.precision.fp8_report:
            metrics |= fp8_state.metrics(reports, new["fp8"])
        if "ema" in state:
            new["ema"] = optax.incremental_update(
                parameters, state["ema"], 1.0 - config.optimizer.ema_decay
            )
        # A loss or gradient that is no number must not reach what training has built up. A router
        # bias that is none steers choices and leaves no trace in either.
        finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)
        for bias in jax.tree.leaves(state["router_bias"]):
            finite &= jnp.all(jnp.isfinite(bias))
        new = {
            name: jax.tree.map(lambda new, old: jnp.where(finite, new, old), value, state[name])
            for name, value in new.items()
        }
        metrics["skipped_updates"] = state["step"] + 1 - new["update"]
        metrics["update_skipped"] = (~finite).astype(jnp.int32)
        return {**new, "step": state["step"] + 1}, metrics

    return train_step


class Scale(NamedTuple):
    """What sums over a micro-batch are multiplied by, so that they add up to means.

    token: [] float32, of sums over tokens, 1 / loss weights of the global batch.
    sequence: of sums over sequences.
    micro_batch: of what is a mean of its own in each micro-batch.
    weights: [] float32, of losses in the objective, by their names with "_weight".
    """

    token: jax.Array
    sequence: float
    micro_batch: float
    weights: Metrics


def _balance_losses(stats: RoutingStats, scale: Scale, config: Config) -> Metrics:
    """This micro-batch's part of each balance loss that has a weight, without its weight."""
    moe = config.model.moe
    # Each layer's own: the depths of multi-token prediction route fewer and fewer.
    tokens_N = jnp.sum(stats.load_E, axis=-1) // moe.num_experts_per_tok
    of_batch = balance.batch_losses(stats.load_E, stats.share_E, stats.z, tokens_N, moe)
    return {
        **{name: jnp.sum(x) * scale.sequence for name, x in stats.sequence_losses.items()},
        **{name: x * scale.micro_batch for name, x in of_batch.items()},
    }


def _first_not_finite(z_ML: jax.Array) -> jax.Array:
    """The first routed layer, from 0 on, whose router has a score that is no number; -1 for none.

    Args:
      z_ML: [micro_batches, layers] float32, `RoutingStats.z`.
    """
    bad_L = jnp.any(~jnp.isfinite(z_ML), axis=0)
    return jnp.where(jnp.any(bad_L), jnp.argmax(bad_L), -1)


def _ahead_loss(model: Decoder, hidden_KBLD: jax.Array, batch: Batch) -> jax.Array:
    """The mean over depths of the loss's sum over tokens (DeepSeek-V3, equations 24 and 25)."""
    total = jnp.zeros((), jnp.float32)
    for k, hidden in enumerate(hidden_KBLD, start=1):
        weights = shifted(batch["loss_weights"], k) * reaches(batch["segment_ids"], k)
        total += model.loss(hidden, shifted(batch["targets"], k), weights)
    return total / len(hidden_KBLD)


def make_eval_step(config: Config) -> Callable[[Tree, Batch], tuple[jax.Array, jax.Array]]:
    """The function (state, batch) -> (sum of the loss in nats, sum of the loss weights)."""
    graphdef = graph(config)

    def eval_step(state, batch):
        batch = jax.tree.map(lambda x: x[0], batch)
        trees = state["parameters"], state["router_bias"], state.get("fp8", {})
        model = nnx.merge(graphdef, *trees)
        hidden, _ = model.hidden_states(batch["tokens"], batch["segment_ids"], batch["positions"])
        loss = model.loss(hidden, batch["targets"], batch["loss_weights"])
        return loss, jnp.sum(batch["loss_weights"])

    return eval_step
