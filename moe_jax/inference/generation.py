"""Writes on after prompts, many at once."""

import collections
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.config import UserError
from moe_jax.inference.sampling import GREEDY, Sampling
from moe_jax.inference.steps import Steps
from moe_jax.models.language_model import LanguageModel

SHORTEST = 16  # prompts are padded to a power of two from here on, so that few lengths compile


class Generator:
    """Continues prompts; what is compiled serves all of the same number and padded length.

        generator = Generator(model, slots=128)
        tokens = generator(prompts, max_new_tokens=64)

    Args:
      model: on any mesh.
      slots: of the cache, the most tokens of a row.
      sampling: how tokens are chosen.
      end_ids: tokens after which a row ends.
      speculative: tokens are drafted by multi-token prediction and verified; greedy alone.
    Raises:
      ValueError: the sampling is impossible, or what `speculative` needs is not there.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int,
        sampling: Sampling = GREEDY,
        end_ids: frozenset[int] = frozenset(),
        speculative: bool = False,
    ):
        sampling.check()
        if speculative:
            check_speculation(sampling, model.config.num_nextn_predict_layers)
        self.model, self.slots, self.end_ids = model, slots, end_ids
        self.compile_seconds = 0.0
        self._steps = Steps(model.graphdef, slots, sampling, speculative)
        self._compiled: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def __call__(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, seed: int = 0
    ) -> list[list[int]]:
        """The new tokens of each row; see `start`."""
        result: list[list[int]] = [[] for _ in prompts]
        for new in self.start(prompts, max_new_tokens, seed):
            for tokens, more in zip(result, new, strict=True):
                tokens += more
        return result

    def start(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, seed: int = 0
    ) -> "Generation":
        """Compiles what is new and reads the prompts.

        Args:
          prompts: ids, [length] each.
          max_new_tokens: after which a row ends.
          seed: of the draws.
        Raises:
          ValueError: see `check_prompts`.
        """
        check_prompts(prompts, self.slots, self.model.config.vocab_size)
        lengths = np.array([len(prompt) for prompt in prompts])
        padded = max(SHORTEST, 1 << (int(lengths.max()) - 1).bit_length())
        tokens = np.zeros((len(prompts), min(padded, self.slots)), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        inputs = (np.uint32(seed % 2**32), self.model.place(tokens), self.model.place(lengths))
        if tokens.shape not in self._compiled:
            begin = time.perf_counter()
            self._compiled[tokens.shape] = self._compile(inputs)
            self.compile_seconds += time.perf_counter() - begin
        return Generation(self, self._compiled[tokens.shape], inputs, lengths, max_new_tokens)

    def _compile(self, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        with jax.set_mesh(self.model.mesh):
            lowered = jax.jit(self._steps.prefill).lower(self.model.weights, *inputs)
            prefill = lowered.compile()
            _, state, cache = jax.tree.map(
                lambda info, sharding: jax.ShapeDtypeStruct(
                    info.shape, info.dtype, sharding=sharding
                ),
                lowered.out_info,
                prefill.output_shardings,
            )
            seed, _, active = inputs
            # The cache is donated: there is never a second one.
            advance = jax.jit(self._steps.advance, donate_argnums=4).lower(
                self.model.weights, seed, active, state, cache
            )
            return prefill, advance.compile()


class Generation:
    """The rows of one call of `Generator.start`, each ending by itself.

        for new in generation:
            for row, tokens in enumerate(new):
                ...

    begun: when the prompts were handed to the devices, of `time.perf_counter`.
    drafted, accepted: tokens drafted so far, and those of them that the model confirmed.
    """

    def __init__(
        self,
        generator: Generator,
        compiled: tuple[Any, Any],
        inputs: tuple[Any, ...],
        lengths: np.ndarray,
        max_new_tokens: int,
    ):
        self._generator, (prefill, self._advance) = generator, compiled
        self.drafted = self.accepted = 0
        self._seed = inputs[0]
        self._left = np.minimum(max_new_tokens, generator.slots - lengths)
        self._active = np.ones(len(lengths), bool)
        self._placed: jax.Array | None = None  # `_active` on the devices, unless it changed
        self.begun = time.perf_counter()
        new, self._state, self._cache = prefill(generator.model.weights, *inputs)
        # Results are read one step late, so that the devices never wait for the host.
        self._pending = collections.deque([new])

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Steps until all rows have ended: the new tokens of each, none for one that has."""
        while self._active.any():
            if self._placed is None:
                self._placed = self._generator.model.place(self._active)
            new, self._state, self._cache = self._advance(
                self._generator.model.weights, self._seed, self._placed, self._state, self._cache
            )
            self._pending.append(new)
            yield self._take(np.asarray(self._pending.popleft()))

    def has_ended(self, row: int) -> bool:
        return not self._active[row]

    def stop(self, row: int) -> None:
        """Ends a row; the tokens that are under way are dropped."""
        self._active[row] = False
        self._placed = None

    def _take(self, new_BL: np.ndarray) -> list[list[int]]:
        """The tokens of a step's rows that belong to their texts."""
        result: list[list[int]] = []
        for row in range(len(self._active)):
            tokens = new_BL[row].tolist()
            kept: list[int] = []
            if self._active[row] and len(tokens) > 1:
                self.drafted += 1
                self.accepted += tokens[1] >= 0
            for token in tokens:
                if self._active[row] and token >= 0:
                    kept.append(token)
                    self._left[row] -= 1
                    if token in self._generator.end_ids or not self._left[row]:
                        self.stop(row)
            result.append(kept)
        return result


def check_speculation(sampling: Sampling, depth: int) -> None:
    """Raises:
    ValueError: the model, of this depth of multi-token prediction, or the sampling forbid it.
    """
    if not depth:
        raise UserError(
            "speculative needs a model with multi-token prediction, and this one has none"
        )
    if sampling.temperature:
        raise UserError(
            f"speculative is greedy; temperature={sampling.temperature} must be 0 with it"
        )


def check_prompts(prompts: Sequence[np.ndarray], slots: int, vocab_size: int) -> None:
    """Raises:
    ValueError: there is no prompt, or one is empty, longer than the cache or has ids outside the
      vocabulary.
    """
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    for i, prompt in enumerate(prompts):
        name = f"prompt {i + 1}" if len(prompts) > 1 else "the prompt"
        if not len(prompt):
            raise UserError(f"{name} is empty; give at least one token")
        outside = [int(token) for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise UserError(
                f"{name} has the token id {outside[0]}; ids of this model are 0 to {vocab_size - 1}"
            )
        if len(prompt) >= slots:
            raise UserError(
                f"{name} has {len(prompt)} tokens, and a cache of {slots} must hold one more; "
                "shorten it or lengthen the cache"
            )
