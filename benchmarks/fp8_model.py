"""The small model of FP8 benchmarks: training steps in any precision, all compiled once.

configs/tiny.py with two layers, dims of whole tiles, and rows of one length; routed experts lie on
two emulated devices, so that tokens travel to them. The rate falls to almost nothing, since what
runs end at should be the precision's doing and not that of the last few batches.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import tiny
from moe_jax import platform, sharding, validation
from moe_jax.config import Config
from moe_jax.data.corpus import split_holdout
from moe_jax.data.loader import train_batches
from moe_jax.data.sources import open_corpus
from moe_jax.schedules import scheduled
from moe_jax.training.evaluation import Evaluation
from moe_jax.training.step import Tree, init_state, make_train_step

PRECISIONS = {
    "float32": {"compute_dtype": "float32"},
    "bf16": {},
    "fp8_block": {"recipe": "fp8_block"},
    "fp8_tensor": {"recipe": "fp8_tensor"},
    "fp8_delayed": {"recipe": "fp8_delayed"},
    "mxfp8": {"recipe": "mxfp8"},
}
MODEL = {
    "mesh.num_cpu_devices": 2,
    "mesh.fsdp": 1,
    "mesh.expert": 2,
    "model.num_hidden_layers": 2,
    "model.attention.q_lora_rank": 128,
    "model.attention.kv_lora_rank": 128,
    "model.moe.num_experts": 8,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.intermediate_size": 128,
    "data.stages": ({"sequence_length": 128},),
    "data.prefetch": 0,
    "training.tokens_per_step": 4096,
    "optimizer.final_lr": 1e-5,
    "training.rematerialization": "none",
    "training.eval_batches": 32,
}


def start() -> None:
    # Threads beyond the emulated devices: each waits in a collective, and work must go on.
    os.environ.setdefault("NPROC", "8")
    platform.start(config_of("bf16").mesh)


def config_of(precision: str, seed: int = 0, **settings: Any) -> Config:
    """Of one of `PRECISIONS`; fields by their dotted names."""
    raw = tiny.get_config()
    of_precision = {f"precision.{name}": v for name, v in PRECISIONS[precision].items()}
    raw.update_from_flattened_dict({"seed": seed, **MODEL, **of_precision, **settings})
    return validation.parse(raw)


class Bench:
    """The model on its mesh and its data.

    settings: fields of all configs.
    """

    def __init__(self, **settings: Any):
        self._settings = settings
        config = config_of("bf16", **settings)
        self.mesh = sharding.make_mesh(config.mesh)
        self._share = sharding.process_share(self.mesh)
        self._corpus = open_corpus(config.data)
        self._spans, self._held_out = split_holdout(self._corpus.parts, config.data.holdout_every)
        self._steps = functools.cache(self._compiled)
        self._evaluations = functools.cache(self._evaluation)

    def config(self, precision: str, seed: int = 0) -> Config:
        return config_of(precision, seed, **self._settings)

    def state(self, precision: str, seed: int) -> Tree:
        """Before the first step: the same parameters in all precisions."""
        return jax.jit(lambda: init_state(self.config(precision, seed)))()

    def batches(self, seed: int) -> Iterator[dict[str, jax.Array]]:
        """The same ones in all precisions."""
        config = self.config("bf16", seed)
        for batch in train_batches(config, self._corpus, self._spans, self._share):
            yield self._place(batch)

    def step(self, precision: str, state: Tree, batch: dict[str, jax.Array]) -> Any:
        """The next state, and the metrics once they are there."""
        values = scheduled(self.config(precision), int(state["step"]))
        # Two steps at once would wait in each other's collectives.
        return jax.block_until_ready(self._steps(precision)(state, batch, values))

    def held_out(self, precision: str, state: Tree) -> float:
        """The loss of what is held out, nats a byte."""
        loss = self._evaluations(precision)(state, self.config(precision).data.stages[-1])
        assert loss is not None
        return loss

    def gradient(
        self, precision: str, state: Tree, batch: dict[str, jax.Array]
    ) -> dict[str, np.ndarray]:
        """Of the loss at this state's parameters, times some number, by parameter."""
        has_state = self.config(precision).precision.fp8_state
        state = {name: tree for name, tree in state.items() if has_state or name != "fp8"}
        # What a first moment is that was zero.
        state["optimizer"] = jax.tree.map(jnp.zeros_like, state["optimizer"])
        moments = self.step(precision, state, batch)[0]["optimizer"]["mu"]
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(moments))
        return {"/".join(key.key for key in path): leaf for path, leaf in leaves}

    def _compiled(self, precision: str) -> Any:
        """The train step; it knows no seed."""
        return jax.jit(make_train_step(self.config(precision)))

    def _evaluation(self, precision: str) -> Evaluation:
        config = self.config(precision)
        return Evaluation(config, self._corpus, self._held_out, self._share, self._place)

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return jax.device_put(batch, sharding.batch_sharding(self.mesh))
