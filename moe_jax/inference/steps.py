"""The functions that are compiled: prompts into a cache, then one more token of each row, or two.

With speculation, each step also drafts the token after the next by multi-token prediction, and the
next step reads both. A draft that the model would have chosen itself is accepted, so that the text
is the same, and the step gives two tokens (DeepSeek-V3, sections 2.2 and 5.4.3).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.inference.cache import with_slots
from moe_jax.inference.sampling import Sampling, choose
from moe_jax.models.decoder import Cache, Decoder
from moe_jax.sharding import BATCH, P

Weights = tuple[Any, ...]  # of `LanguageModel.weights`


class State(NamedTuple):
    """Of each row between two steps, [batch] int32.

    tokens_B: the last token, which the model has not read yet.
    drafts_B: a guess at the one after it; of use with speculation alone.
    positions_B: of the last token.
    """

    tokens_B: jax.Array
    drafts_B: jax.Array
    positions_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Steps:
    """Pure functions, to be called under `jax.set_mesh`; each gives the new tokens of all rows.

    These are [batch, 1 or 2] int32, whole on every device, with -1 where there is none.
    """

    graphdef: nnx.GraphDef
    slots: int
    sampling: Sampling
    speculative: bool

    def prefill(
        self, weights: Weights, seed: jax.Array, tokens_BL: jax.Array, lengths_B: jax.Array
    ) -> tuple[jax.Array, State, Cache]:
        """Reads prompts, padded on the right; a row of length 0 only fills up the mesh."""
        decoder = self._decoder(weights)
        positions_BL = jnp.zeros_like(tokens_BL) + jnp.arange(tokens_BL.shape[1])
        segment_ids_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
        inputs = (tokens_BL, segment_ids_BL, positions_BL)
        hidden_BLD, entries = decoder.prefill(*inputs)
        if self.speculative:
            entries |= decoder.prefill_ahead(hidden_BLD, *inputs)
        cache = with_slots(entries, self.slots)

        last_B = jnp.maximum(lengths_B - 1, 0)
        hidden_BD = _at(hidden_BLD, last_B)
        chosen_B = drafts_B = self._choose(decoder, hidden_BD, lengths_B, seed)
        if self.speculative:
            ahead_B1D, cache = decoder.decode_ahead(
                hidden_BD[:, None], chosen_B[:, None], last_B[:, None], lengths_B > 0, cache
            )
            drafts_B = _best(decoder, ahead_B1D[:, 0])
        return sharding.gather(chosen_B[:, None]), State(chosen_B, drafts_B, lengths_B), cache

    def advance(
        self, weights: Weights, seed: jax.Array, active_B: jax.Array, state: State, cache: Cache
    ) -> tuple[jax.Array, State, Cache]:
        """The next step; rows where `active_B`, [batch] int32, is 0 only take part in it."""
        if self.speculative:
            return self._two_tokens(weights, active_B > 0, state, cache)
        decoder = self._decoder(weights)
        hidden_B1D, cache = decoder.decode(
            state.tokens_B[:, None], state.positions_B[:, None], active_B > 0, cache
        )
        positions_B = state.positions_B + 1
        chosen_B = self._choose(decoder, hidden_B1D[:, 0], positions_B, seed)
        return sharding.gather(chosen_B[:, None]), State(chosen_B, chosen_B, positions_B), cache

    def _two_tokens(self, weights, active_B, state, cache):
        decoder = self._decoder(weights)
        tokens_BL = jnp.stack([state.tokens_B, state.drafts_B], axis=1)
        positions_BL = jnp.stack([state.positions_B, state.positions_B + 1], axis=1)
        hidden_BLD, cache = decoder.decode(tokens_BL, positions_BL, active_B, cache)
        chosen_BL = _best(decoder, hidden_BLD)
        # 1 where the draft is what the model chooses itself.
        accepted_B = jnp.sum(chosen_BL[:, :1] == state.drafts_B[:, None], axis=1, dtype=jnp.int32)
        # What follows a refused draft is wrong in both caches; the next step writes over it.
        ahead_BLD, cache = decoder.decode_ahead(
            hidden_BLD, chosen_BL, positions_BL, active_B, cache
        )
        state = State(
            _at(chosen_BL, accepted_B),
            _best(decoder, _at(ahead_BLD, accepted_B)),
            state.positions_B + 1 + accepted_B,
        )
        new_BL = jnp.where(jnp.arange(2) <= accepted_B[:, None], chosen_BL, -1)
        return sharding.gather(new_BL), state, cache

    def _decoder(self, weights: Weights) -> Decoder:
        return nnx.merge(self.graphdef, *weights)

    def _choose(self, decoder, hidden_BD, positions_B, seed):
        rows_B = jnp.zeros_like(positions_B) + jnp.arange(len(positions_B))

        def choose_here(logits_BV, rows_B, positions_B, seed):
            return choose(logits_BV, rows_B, positions_B, seed, self.sampling)

        return jax.shard_map(choose_here, in_specs=(BATCH, BATCH, BATCH, P()), out_specs=BATCH)(
            decoder.logits(hidden_BD), rows_B, positions_B, seed
        )


def _best(decoder: Decoder, hidden: jax.Array) -> jax.Array:
    return jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)


def _at(x: jax.Array, index_B: jax.Array) -> jax.Array:
    """x[b, index[b]] of [batch, length, ...], by a masked sum, whatever the mesh."""
    here_BL = jnp.arange(x.shape[1]) == index_B[:, None]
    return jnp.sum(jnp.where(jnp.expand_dims(here_BL, tuple(range(2, x.ndim))), x, 0), axis=1)
