"""Very small runs, and what can be done to them."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moe_jax
from moe_jax import validation
from moe_jax.config import Config

ROOT = Path(moe_jax.__path__[0]).parent
# The smallest with latent attention and routed experts.
MODEL: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.first_k_dense_replace": 0,
    "model.attention.num_heads": 2,
    "model.attention.q_lora_rank": 8,
    "model.attention.kv_lora_rank": 8,
    "model.attention.qk_nope_head_dim": 4,
    "model.attention.qk_rope_head_dim": 4,
    "model.attention.v_head_dim": 4,
    "model.moe.num_experts": 8,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.intermediate_size": 8,
}
SMALL: dict[str, Any] = {
    "mesh.num_cpu_devices": 2,
    "mesh.fsdp": 1,
    "mesh.expert": 2,
    **MODEL,
    "precision.compute_dtype": "float32",
    "optimizer.warmup_steps": 2,
    "data.stages": ({"sequence_length": 16},),
    "data.num_streams": 4,
    "training.num_steps": 12,
    "training.tokens_per_step": 128,
    "training.log_every_steps": 1,
    "training.eval_every_steps": 6,
    "training.eval_batches": 1,
    "training.sample_tokens": 0,
    "checkpoint.every_steps": 2,
    "collapse.dead_steps": 0,
}


def write_corpus(folder: Path) -> str:
    """Forty short texts; returns what `data.source` takes."""
    folder.mkdir(parents=True)
    for i in range(40):
        (folder / f"{i:02}.txt").write_text("the cat sat on the mat. " * (1 + i % 7) + str(i))
    return str(folder / "*.txt")


def config(source: str, changes: Mapping[str, Any] | None = None) -> Config:
    """configs/tiny.py, cut down."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "configs" / "tiny.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    raw = module.get_config()
    raw.update_from_flattened_dict({**SMALL, "data.source": source, **(changes or {})})
    return validation.parse(raw)


def flags(source: str, workdir: Path, changes: Mapping[str, Any] | None = None) -> list[str]:
    """The same, of the command."""
    fields = {**SMALL, "data.source": source, **(changes or {})}
    return [
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def poisoned(make_train_step: Callable, place: str, at: int) -> Callable:
    """`make_train_step` whose steps meet a NaN at step `at`, and from then on where it stays.

    Args:
      place: "batch", "gradient", "expert", "bias"; or "spike", of which steps on see other targets.
    """

    def make(config: Config) -> Callable:
        step = make_train_step(config)

        def poisoned_step(state, batch, scheduled):
            now = state["step"] == at - 1
            if place == "batch":
                batch = {**batch, "loss_weights": _set_nan(batch["loss_weights"], now)}
            elif place == "spike":
                late = state["step"] >= at - 1
                targets = jnp.where(late, 255 - batch["tokens"], batch["targets"])
                batch = {**batch, "targets": targets}
            elif place == "gradient":
                # The loss stays as it was; the norm's gradient is beyond what float32 can square.
                old = state["parameters"]
                scale = old["norm"]["scale"] * jnp.where(now, 1e-25, 1.0)
                weight = old["head"]["weight"] * jnp.where(now, 1e25, 1.0)
                new = {"norm": {"scale": scale}, "head": {"weight": weight}}
                state = {**state, "parameters": {**old, **new}}
            else:
                name = "['gate']" if place == "expert" else "['router_bias']"
                state = jax.tree_util.tree_map_with_path(
                    lambda path, x: (
                        _set_nan(x, now)
                        if name in jax.tree_util.keystr(path)
                        and "optimizer" not in jax.tree_util.keystr(path)
                        else x
                    ),
                    state,
                )
            return step(state, batch, scheduled)

        return poisoned_step

    return make


def _set_nan(x: jax.Array, now: jax.Array) -> jax.Array:
    """One value of x, if it is time."""
    mask = np.zeros(x.shape, bool)
    mask[(0,) + tuple(size - 1 for size in x.shape[1:])] = True
    mask = jax.sharding.reshard(jnp.asarray(mask), jax.typeof(x).sharding.spec)
    return jnp.where(mask & now, jnp.nan, x)
