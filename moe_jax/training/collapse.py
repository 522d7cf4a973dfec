"""Warnings of experts that collapse: some get nothing, some far too much, or all look alike."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_jax.config import CollapseConfig
from moe_jax.fields import RunError


class ExpertWatch:
    """Looks at every step's load; each warning comes once, and again only after it was over."""

    def __init__(self, config: CollapseConfig):
        self._config = config
        self._idle_LE: Any = 0  # steps since each expert's last token
        self._warned: set[tuple] = set()

    def look(self, metrics: dict[str, Any]) -> list[str]:
        """What is new, each in a sentence; nothing without routed layers.

        Args:
          metrics: of the step, on the host. `expert_load` is [routed layers, experts] int32, the
            tokens that chose each expert; `router_entropy` [routed layers] float32, from 0 to 1.
        Raises:
          RunError: something is, and the config has it end the run.
        """
        if "expert_load" not in metrics:
            return []
        load_LE, entropy_L = metrics["expert_load"], metrics["router_entropy"]
        self._idle_LE = np.where(load_LE > 0, 0, self._idle_LE + 1)
        now = dict(self._found(load_LE, entropy_L))
        new = [text for key, text in now.items() if key not in self._warned]
        self._warned = set(now)
        if new and self._config.stop:
            raise RunError(f"{'; '.join(new)} (config.collapse.stop=True)")
        return new

    def _found(self, load_LE: np.ndarray, entropy_L: np.ndarray) -> Iterator[tuple[tuple, str]]:
        config = self._config
        for layer, expert in np.argwhere(self._idle_LE >= (config.dead_steps or math.inf)):
            yield (
                ("dead", layer, expert),
                f"expert {expert} of routed layer {layer} has had no token in "
                f"{config.dead_steps} steps",
            )
        violation_L = load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9) - 1
        for (layer,) in np.argwhere(violation_L > (config.max_violation or math.inf)):
            yield (
                ("violation", layer),
                f"expert {load_LE[layer].argmax()} of routed layer {layer} has "
                f"{violation_L[layer]:.1f} times the mean load above it, more than "
                f"config.collapse.max_violation={config.max_violation}",
            )
        for (layer,) in np.argwhere(entropy_L < config.min_entropy):
            yield (
                ("entropy", layer),
                f"the router of routed layer {layer} has an entropy of {entropy_L[layer]:.2f} of "
                f"the largest, below config.collapse.min_entropy={config.min_entropy}; expert "
                f"{load_LE[layer].argmax()} has most tokens",
            )
