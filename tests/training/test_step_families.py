"""The step of every family, and every loss that it may have."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import quick_jit
from flax import nnx
from step_runs import (
    CONFIG,
    EXPERTS,
    LAYERS,
    ROWS,
    TOP_K,
    assert_close,
    layout_of,
    make_batch,
    make_state,
    mesh_of,
    run,
)

from moe_jax import sharding
from moe_jax.config import (
    AttentionConfig,
    Config,
    RopeConfig,
)
from moe_jax.training.step import graph, make_eval_step


def _family(moe: dict[str, Any], **model: Any) -> Config:
    changed = dataclasses.replace(CONFIG.model.moe, **{"sequence_loss_weight": 0.0, **moe})
    model = {"moe": changed, **model}
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **model))


GROUPED = AttentionConfig(kind="grouped_query", num_heads=4, num_key_value_heads=2, head_dim=4)
LLAMA: dict[str, Any] = dict(
    attention=GROUPED,
    first_k_dense_replace=LAYERS,
    intermediate_size=12,
    rope=RopeConfig(
        interleaved=False, scaling="llama3", factor=4.0, original_max_position_embeddings=16
    ),
)
PLAIN: dict[str, Any] = dict(
    scoring_func="softmax",
    topk_method="greedy",
    num_expert_groups=1,
    num_limited_groups=1,
    routed_scaling_factor=1.0,
)
V2 = dict(
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    num_shared_experts=1,
    expert_loss_weight=0.1,
    device_loss_weight=0.2,
    communication_loss_weight=0.3,
    num_device_groups=4,
    token_dropping="device",
    capacity_factor=0.5,
    capacity_group=2,
)
SWITCH = dict(
    num_experts_per_tok=1,
    norm_topk_prob=False,
    switch_loss_weight=0.1,
    z_loss_weight=0.01,
    token_dropping="expert",
    capacity_factor=0.5,
    capacity_group=None,
)
EIGHT = {"fsdp": 2, "expert_outer": 2, "expert": 2}
# What a family is, and how its step is cut and spread. Losses and capacities of a micro-batch
# depend on how many there are.
FAMILIES: dict[str, tuple[Config, int, dict[str, int]]] = {
    "v3": (
        _family(
            {"num_shared_experts": 1, "sequence_loss_weight": 0.1},
            attention=dataclasses.replace(CONFIG.model.attention, q_lora_rank=6),
            rope=RopeConfig(scaling="yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0),
            first_k_dense_replace=1,
            intermediate_size=12,
            num_nextn_predict_layers=2,
        ),
        2,
        {"fsdp": 2, "expert": 2},
    ),
    "v2": (_family(V2), 1, EIGHT),
    "mixtral": (_family({**PLAIN, "mixtral_loss_weight": 0.1}, attention=GROUPED), 1, EIGHT),
    "switch": (_family({**PLAIN, **SWITCH}, attention=GROUPED), 1, EIGHT),
    "llama": (_family({}, **LLAMA, num_nextn_predict_layers=1), 2, {"data": 2, "fsdp": 2}),
    "llama-tied": (_family({}, **LLAMA, tie_word_embeddings=True), 2, {"fsdp": 4}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_all_its_parameters_and_alike_on_a_mesh(name: str) -> None:
    config, micro_batches, axes = FAMILIES[name]
    start = make_state(config)
    start["optimizer"] = jax.tree.map(np.zeros_like, start["optimizer"])
    state, metrics = run(start, make_batch(), config=config)
    for path, gradient in jax.tree_util.tree_leaves_with_path(state["optimizer"]["mu"]):
        name_of = jax.tree_util.keystr(path)
        stacked = "blocks" in name_of or "mtp" in name_of
        for layer, part in enumerate(gradient if stacked else gradient[None]):
            assert np.max(np.abs(part)) > 1e-7, f"{name_of}, layer {layer}"
    assert ("head" in state["parameters"]) == (not config.model.tie_word_embeddings)
    assert (metrics["dropped_tokens"] > 0) == (config.model.moe.token_dropping != "none")
    moved = jax.tree.map(np.subtract, state["router_bias"], start["router_bias"])
    assert set(moved) == ({"moe_blocks", "mtp"} if name == "v3" else set())

    split, split_metrics = run(start, make_batch(micro_batches), "full", config, **axes)
    # Moments that began at 0 are bare gradients, small sums of large terms.
    assert_close(split, state, atol=2e-5)
    for metric, value in metrics.items():
        if metric != "dispatch_rounds":
            np.testing.assert_allclose(
                split_metrics[metric], value, rtol=2e-5, atol=1e-12, err_msg=metric
            )


def test_evaluation_drops_nothing() -> None:
    config = FAMILIES["switch"][0]
    moe = dataclasses.replace(config.model.moe, token_dropping="none")
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    assert run(make_state(config), make_batch(), config=config)[1]["dropped_tokens"] > 0
    with jax.set_mesh(mesh_of(())):
        state = jax.device_put(make_state(config), layout_of((), config))
        batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh_of(())))
        losses = [quick_jit(make_eval_step(each))(state, batch)[0] for each in (config, whole)]
    assert float(losses[0]) == float(losses[1])


# Every loss that there is, each with a weight of its own.
PER_SEQUENCE = {
    "sequence_loss": 0.5,
    "expert_loss": 0.7,
    "device_loss": 1.1,
    "communication_loss": 1.3,
}
PER_MICRO_BATCH = {"switch_loss": 1.7, "mixtral_loss": 1.9, "z_loss": 0.3}
BALANCE = {**PER_SEQUENCE, **PER_MICRO_BATCH}


def _weighted(weight: float) -> Config:
    """With all losses at `weight` times their weight; gradients are not clipped."""
    moe = {f"{name}_weight": weight * value for name, value in BALANCE.items()}
    config = _family({**moe, "num_device_groups": 4}, num_nextn_predict_layers=2)
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, clip_norm=1e9),
        training=dataclasses.replace(config.training, mtp_loss_weight=0.6 * weight),
    )


def _reaching(segments: np.ndarray, places: int) -> np.ndarray:
    """Tokens whose document has one so many places on."""
    reaching = segments > 0
    reaching[:, -places:] = False
    reaching[:, :-places] &= segments[:, places:] == segments[:, :-places]
    return reaching


def _added_losses(graphdef: nnx.GraphDef, total_weight: float) -> Any:
    """A function of parameters, bias and a micro-batch: gradient of what `_weighted` adds, parts.

    Over a micro-batch of two, out of the papers' equations and what the routers report.
    """

    def added(parameters, bias, batch, counts):
        model = nnx.merge(graphdef, parameters, bias)
        inputs = [batch[name] for name in ("tokens", "segment_ids", "positions")]
        hidden, main = model.hidden_states(*inputs, training=True)
        ahead = model.predict_ahead(hidden, *inputs, training=True)
        parts = dict.fromkeys(BALANCE, 0.0) | {"mtp_loss": 0.0}
        for stats, tokens in ((main, counts["main"]), (ahead.stats, counts["ahead"])):
            for name in PER_SEQUENCE:
                parts[name] += jnp.sum(stats.sequence_losses[name]) / ROWS
            f, p = stats.load_E / tokens[:, None] / TOP_K, stats.share_E / tokens[:, None]
            parts["switch_loss"] += EXPERTS * jnp.sum(f * p) / 2
            mixtral = TOP_K * EXPERTS * jnp.sum(jnp.mean(f, axis=0) * jnp.mean(p, axis=0))
            parts["mixtral_loss"] += mixtral / 2
            parts["z_loss"] += jnp.sum(stats.z / tokens) / 2
        for k in (1, 2):
            logits = jax.nn.log_softmax(model.logits(ahead.hidden_KBLD[k - 1]), axis=-1)
            targets = jnp.roll(batch["targets"], -k, axis=1)
            nll = -jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            weights = jnp.roll(batch["loss_weights"], -k, axis=1) * batch[f"reaching_{k}"]
            parts["mtp_loss"] += jnp.sum(weights * nll) / total_weight / 2
        factors = {**BALANCE, "mtp_loss": 0.6}
        return sum(factors[name] * value for name, value in parts.items()), parts

    return quick_jit(jax.grad(added, has_aux=True))


def test_every_loss_is_reported_and_counts_by_its_weight() -> None:
    """Over two micro-batches, recomputed: what the losses add to the gradient and the metrics."""
    with_all, without = _weighted(1.0), _weighted(0.0)
    start, batch = make_state(with_all), make_batch(2)
    start["optimizer"] = jax.tree.map(np.zeros_like, start["optimizer"])
    state, metrics = run(start, batch, "full", with_all)
    plain_state, plain = run(start, batch, "full", without)
    assert {name for name in metrics if name.endswith("loss")} == {"loss", "mtp_loss", *BALANCE}
    assert {name for name in plain if name.endswith("loss")} == {"loss", "mtp_loss"}
    for name in ("loss", "mtp_loss"):
        assert plain[name] == pytest.approx(metrics[name], rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state["router_bias"], plain_state["router_bias"])

    with jax.set_mesh(mesh_of(())):
        function = _added_losses(graph(with_all), float(np.sum(batch["loss_weights"])))
        expected = None
        placed = jax.device_put(start, layout_of((), with_all))
        for i in range(2):
            micro_batch = {name: array[i] for name, array in batch.items()}
            segments = micro_batch["segment_ids"]
            reaching = {k: _reaching(segments, k) for k in (1, 2)}
            micro_batch |= {f"reaching_{k}": x.astype(np.float32) for k, x in reaching.items()}
            counts = {
                "main": np.full(LAYERS, np.sum(segments > 0), np.float32),
                "ahead": np.array([np.sum(x) for x in reaching.values()], np.float32),
            }
            micro_batch = jax.device_put(
                micro_batch, jax.NamedSharding(mesh_of(()), sharding.BATCH)
            )
            arguments = (placed["parameters"], placed["router_bias"], micro_batch, counts)
            found = jax.device_get(function(*arguments))
            expected = found if expected is None else jax.tree.map(np.add, expected, found)
        gradients, parts = expected
    for name, value in parts.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
        assert value > 0.1, name
    added = jax.tree.map(
        lambda a, b: (a - b) / (1 - CONFIG.optimizer.b1),
        state["optimizer"]["mu"],
        plain_state["optimizer"]["mu"],
    )

    def close(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        scale = np.max(np.abs(b))
        np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(close, added, gradients)
