"""The decoder: embedding, dense layers, layers with routed experts, norm, head."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, PrecisionConfig
from moe_jax.layers.cache import Entries, LayerCache
from moe_jax.layers.linear import Embedding, Initializer, Linear, RMSNorm
from moe_jax.layers.moe import RouterBias, RoutingStats
from moe_jax.models.block import Block, Context, make_context, policy_of, scan, stack
from moe_jax.models.multi_token_prediction import Ahead, PredictionModule, reaches, shifted
from moe_jax.ops.cross_entropy import projected_cross_entropy

Cache = dict[str, Entries]  # by stack of layers


class Decoder(nnx.Module):
    """A language model of the DeepSeek, Mixtral or Llama kind.

    Layers of a kind are stacked along a leading dim of their parameters and scanned, so that
    compile time does not grow with depth.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: PrecisionConfig,
        *,
        rematerialization: str = "none",
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(precision.compute_dtype)
        initializer = Initializer.of(config)
        dim, dense = config.hidden_size, config.first_k_dense_replace
        routed = config.num_hidden_layers - dense
        self.config = config
        self.policy = policy_of(rematerialization, precision)
        self.embedding = Embedding(
            config.vocab_size, dim, initializer=initializer, dtype=dtype, rngs=rngs
        )
        block = functools.partial(Block, config, precision)
        self.dense_blocks = stack(dense, functools.partial(block, routed=False), rngs)
        self.moe_blocks = stack(routed, functools.partial(block, routed=True), rngs)
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        if config.tie_word_embeddings:
            self.head = None
        else:
            self.head = Linear(
                (dim,),
                (config.vocab_size,),
                ("embed", "wide"),
                initializer=initializer,
                dtype=dtype,
                output_dtype=jnp.dtype(jnp.float32),
                rngs=rngs,
            )
        # Of the kind of the last layers, as DeepSeek has it.
        module = functools.partial(PredictionModule, config, precision, routed=routed > 0)
        self.mtp = stack(config.num_nextn_predict_layers, module, rngs)

    def hidden_states(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        *,
        training: bool = False,
    ) -> tuple[jax.Array, RoutingStats | None]:
        """The final norm's output, and what each routed layer reports.

        Args:
          tokens, segment_ids, positions: [batch, length] int32; segment 0 is padding.
          training: whether tokens are dropped where the config has it so.
        Returns:
          [batch, length, dim]; RoutingStats with a leading dim of routed layers, None without any.
        """
        context = make_context(segment_ids, positions, self.config, training)
        with jax.named_scope("embedding"):
            x = self.embedding(tokens)
        with jax.named_scope("dense_layers"):
            x, _ = self._scan(self.dense_blocks, x, context)
        with jax.named_scope("moe_layers"):
            x, stats = self._scan(self.moe_blocks, x, context)
        return self.norm(x), stats

    def predict_ahead(
        self,
        hidden: jax.Array,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        *,
        training: bool = False,
    ) -> Ahead:
        """Multi-token prediction; at depth k = 1, 2, ... position t predicts token t + k + 1.

        Positions whose document ends within k places are routed nowhere; what they give is of no
        use.

        Args:
          hidden: [batch, length, dim] of `hidden_states`, of the same tokens.
        """
        context = make_context(segment_ids, positions, self.config, training)
        depths = range(1, self.config.num_nextn_predict_layers + 1)
        tokens_ahead = jnp.stack([shifted(tokens, k) for k in depths])
        valid = jnp.stack([reaches(segment_ids, k) for k in depths])

        def depth(module, hidden, inputs):
            tokens, valid = inputs
            hidden, stats = module(hidden, self.embedding(tokens), context._replace(valid_BL=valid))
            return hidden, (hidden, stats)

        with jax.named_scope("multi_token_prediction"):
            _, ahead = scan(self.mtp, depth, hidden, (tokens_ahead, valid), self.policy)
        return Ahead(*ahead)

    def prefill(
        self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The hidden states of whole prompts, and what a cache keeps of them.

        Args: as of `hidden_states`.
        Returns:
          [batch, length, dim]; by stack, entries [layers, batch, length, ...].
        """
        context = make_context(segment_ids, positions, self.config, training=False)
        x, entries = self.embedding(tokens), {}
        for name, blocks in self._stacks():
            x, entries[name] = scan(blocks, lambda block, x, _: block.prefill(x, context), x, None)
        return self.norm(x), entries

    def decode(
        self, tokens: jax.Array, positions: jax.Array, active: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """New tokens of each row, after those in the cache.

        Args:
          tokens, positions: [batch, length] int32.
          active: [batch] bool; the tokens of other rows are neither kept nor routed.
          cache: by stack, [layers, batch, slots, ...] by position.
        Returns:
          Hidden states [batch, length, dim]; the cache with these tokens.
        """
        positions, context = self._decoding(positions, active, cache)
        x, cache = self.embedding(tokens), dict(cache)
        for name, blocks in self._stacks():

            def layer(block, carry, number):
                x, stacked = carry
                x, here = block.decode(x, LayerCache(stacked, number), positions, context)
                return (x, here.stacked), None

            numbers = jnp.arange(jax.tree.leaves(cache[name])[0].shape[0])
            (x, cache[name]), _ = scan(blocks, layer, (x, cache[name]), numbers)
        return self.norm(x), cache

    def prefill_ahead(
        self,
        hidden: jax.Array,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
    ) -> Cache:
        """What the cache of the first module of multi-token prediction keeps of whole prompts.

        The last token of each has no next one here; `decode_ahead` writes it.

        Args:
          hidden: [batch, length, dim] of `prefill`, of the same tokens.
        """
        context = make_context(segment_ids, positions, self.config, training=False)
        context = context._replace(valid_BL=reaches(segment_ids, 1))
        module = self._first_module()
        x = module.combine(hidden, self.embedding(shifted(tokens, 1)))
        return {"mtp": jax.tree.map(lambda e: e[None], module.block.prefill(x, context)[1])}

    def decode_ahead(
        self,
        hidden: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array,
        active: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """The first module of multi-token prediction: position t predicts token t + 2.

        Args:
          hidden: [batch, length, dim], of these positions.
          next_tokens: [batch, length] int32, the tokens after them.
          positions, active, cache: as of `decode`.
        """
        positions, context = self._decoding(positions, active, cache)
        module, here = self._first_module(), LayerCache(cache["mtp"], jnp.zeros((), jnp.int32))
        x = module.combine(hidden, self.embedding(next_tokens))
        x, here = module.block.decode(x, here, positions, context)
        return module.norm(x), {**cache, "mtp": here.stacked}

    def _stacks(self) -> list[tuple[str, Block]]:
        stacks = {"dense_blocks": self.dense_blocks, "moe_blocks": self.moe_blocks}
        return [(name, blocks) for name, blocks in stacks.items() if blocks is not None]

    def _first_module(self) -> PredictionModule:
        graphdef, variables = nnx.split(self.mtp)
        return nnx.merge(graphdef, jax.tree.map(lambda v: v[0], variables))

    def _decoding(
        self, positions: jax.Array, active: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Context]:
        """Where tokens are written, behind all slots in rows that are not active; the context."""
        slots = jax.tree.leaves(cache)[0].shape[2]
        segment_ids = jnp.zeros_like(positions) + active[:, None]
        context = make_context(segment_ids, positions, self.config, training=False)
        return jnp.where(active[:, None], positions, slots), context

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., dim] to [..., vocab] float32."""
        with jax.named_scope("head"):
            return self.embedding.logits(hidden) if self.head is None else self.head(hidden)

    def loss(self, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """`cross_entropy` of the logits of hidden states, which are never whole in memory.

        Args:
          hidden: [batch, length, dim].
          targets: [batch, length] int32.
          weights: [batch, length] float32.
        """
        weight = self.embedding.weight[...].T if self.head is None else self.head.weight[...]
        with jax.named_scope("loss"):
            return projected_cross_entropy(hidden, weight, targets, weights, self.embedding.dtype)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [batch, length, vocab] float32 for tokens [batch, length] int32.

        Without positions and segment ids, a row is one document.
        """
        if positions is None:
            positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=tokens.dtype)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        return self.logits(self.hidden_states(tokens, segment_ids, positions)[0])

    def _scan(
        self, blocks: Block | None, x: jax.Array, context: Context
    ) -> tuple[jax.Array, RoutingStats | None]:
        if blocks is None:
            return x, None
        return scan(blocks, lambda block, x, _: block(x, context), x, None, self.policy)


__all__ = ["Ahead", "Decoder", "RouterBias", "RoutingStats"]
