"""One training step: loss, gradients, update, router-bias update. Pure functions of plain trees.

The state is nested dicts of arrays:
  parameters: float32, named as the model names them, stacked [layers, ...].
  router_bias: one [layers, experts] float32 in a tree of the model's names.
  optimizer: {"mu", "nu"}, each like parameters.
  ema: like parameters; only if the config asks for it.
  step: [] int32, batches seen; it advances on a skipped update.
  update: [] int32, updates made; it drives moments and schedules.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.config import Config
from moe_jax.models.decoder import Decoder, RouterBias
from moe_jax.ops import routing
from moe_jax.ops.cross_entropy import cross_entropy
from moe_jax.training.optimizer import AdamW, learning_rate

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


def init_state(config: Config) -> Tree:
    """The state before the first step. Jit it, so that each device makes its own part only."""
    _, parameters, router_bias = nnx.split(make_model(config), nnx.Param, RouterBias)
    parameters = nnx.to_pure_dict(parameters)
    state = {
        "parameters": parameters,
        "router_bias": nnx.to_pure_dict(router_bias),
        "optimizer": AdamW(config.optimizer, config.training.num_steps).init(parameters),
        "step": jnp.zeros((), jnp.int32),
        "update": jnp.zeros((), jnp.int32),
    }
    if config.optimizer.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, parameters)
    return state


def make_train_step(config: Config) -> Callable[[Tree, Batch], tuple[Tree, Metrics]]:
    """The function (state, batch) -> (state, metrics).

    A batch is a dict of [micro_batches, rows, length] arrays (`data.loader`). The loss of each
    micro-batch is divided by the loss weights of the whole global batch, and its balance loss by
    the batch's rows, so gradients, which add in float32, do not depend on how it was cut.
    """
    graphdef = graph(config)
    optimizer = AdamW(config.optimizer, config.training.num_steps)
    alpha = config.model.moe.sequence_loss_weight

    def loss_fn(parameters, router_bias, batch, weight_sum, rows):
        model = nnx.merge(graphdef, parameters, router_bias)
        hidden, stats = model.hidden_states(
            batch["tokens"], batch["segment_ids"], batch["positions"]
        )
        with jax.named_scope("loss"):
            logits = model.head(hidden)
            loss = cross_entropy(logits, batch["targets"], batch["loss_weights"]) / weight_sum
        if stats is None:
            return loss, (loss, None)
        return loss + alpha * jnp.sum(stats.balance_loss) / rows, (loss, stats)

    def gradients(state, batch):
        weight_sum = jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)
        rows = batch["tokens"].shape[0] * batch["tokens"].shape[1]

        def micro_step(total, micro_batch):
            (_, (loss, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state["parameters"], state["router_bias"], micro_batch, weight_sum, rows
            )
            return jax.tree.map(jnp.add, total, grads), (loss, stats)

        zeros = jax.tree.map(jnp.zeros_like, state["parameters"])
        grads, (losses, stats) = jax.lax.scan(micro_step, zeros, batch)
        return grads, jnp.sum(losses), stats

    def train_step(state, batch):
        grads, loss, stats = gradients(state, batch)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            parameters, moments = optimizer.update(
                grads, state["optimizer"], state["parameters"], state["update"]
            )
        new = {
            "parameters": parameters,
            "optimizer": moments,
            "router_bias": state["router_bias"],
            "update": state["update"] + 1,
        }
        tokens = batch["segment_ids"]
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(
                config.optimizer, config.training.num_steps, state["update"]
            ),
            "packing_efficiency": jnp.sum(tokens > 0) / tokens.size,
        }
        if stats is not None:
            # Over micro-batches; the mesh's devices are summed already.
            load_LE = jnp.sum(stats.load_E, axis=0)
            new["router_bias"] = jax.tree.map(
                lambda bias: routing.update_bias(bias, load_LE, config.model.moe.bias_update_speed),
                state["router_bias"],
            )
            balance = jnp.sum(stats.balance_loss) / stats.balance_loss.shape[1]
            violation_L = routing.max_violation(load_LE)
            metrics |= {
                "balance_loss": balance / (tokens.shape[0] * tokens.shape[1]),
                "max_violation": jnp.mean(violation_L),
                "max_violation_worst_layer": jnp.max(violation_L),
                "dispatch_rounds": jnp.max(stats.rounds),
            }
        metrics["dropped_tokens"] = jnp.sum(stats.dropped) if stats else jnp.zeros((), jnp.int32)
        if "ema" in state:
            new["ema"] = optax.incremental_update(
                parameters, state["ema"], 1.0 - config.optimizer.ema_decay
            )
        # A loss or gradient that is no number must not reach what training has built up.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = {
            name: jax.tree.map(lambda new, old: jnp.where(finite, new, old), value, state[name])
            for name, value in new.items()
        }
        metrics["skipped_updates"] = state["step"] + 1 - new["update"]
        return {**new, "step": state["step"] + 1}, metrics

    return train_step


def make_logits(config: Config) -> Callable[..., jax.Array]:
    """The function (state, tokens, positions, segment_ids) -> logits of `Decoder.__call__`."""
    graphdef = graph(config)

    def logits(state, tokens, positions=None, segment_ids=None):
        model = nnx.merge(graphdef, state["parameters"], state["router_bias"])
        return model(tokens, positions, segment_ids)

    return logits


def make_eval_step(config: Config) -> Callable[[Tree, Batch], tuple[jax.Array, jax.Array]]:
    """The function (state, batch) -> (sum of the loss in nats, sum of the loss weights)."""
    logits_of = make_logits(config)

    def eval_step(state, batch):
        batch = jax.tree.map(lambda x: x[0], batch)
        logits = logits_of(state, batch["tokens"], batch["positions"], batch["segment_ids"])
        return (
            cross_entropy(logits, batch["targets"], batch["loss_weights"]),
            jnp.sum(batch["loss_weights"]),
        )

    return eval_step
