"""The loss of next-token prediction.

Shapes: B rows, L length, D model dim, V vocabulary, T tokens of this device, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.sharding import BATCH, BATCH_AXES, P

CHUNK_LOGITS = 2**26  # logits that stand in memory at once; 256 MiB


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, vocab_axes: tuple[str, ...] = ()
) -> jax.Array:
    """Sum over tokens of weight * -log p(target), in nats.

    A sum and no mean: the caller divides by the weights of the whole global batch, so that
    micro-batches of unequal weight add up to the right gradient.

    Args:
      logits: [..., vocab] float32.
      targets: [...] int32.
      weights: [...] float32, 0 where there is nothing to predict.
      vocab_axes: inside a `shard_map`, the mesh axes over which the vocabulary is split.
    Returns:
      [] float32.
    """
    vocab = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    if vocab_axes:
        vocab += jax.lax.axis_index(vocab_axes) * len(vocab)
        highest = jax.lax.pmax(jax.lax.stop_gradient(log_normalizer), vocab_axes)
        total = jax.lax.psum(jnp.exp(log_normalizer - highest), vocab_axes)
        log_normalizer = highest + jnp.log(total)
    # A masked sum and no gather: its gradient needs no scatter.
    target_logits = jnp.sum(jnp.where(vocab == targets[..., None], logits, 0.0), axis=-1)
    if vocab_axes:
        target_logits = jax.lax.psum(target_logits, vocab_axes)
    return jnp.sum(weights * (log_normalizer - target_logits))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def projected_cross_entropy(
    x_BLD: jax.Array,
    weight_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """`cross_entropy` of the logits x @ weight, of which only a chunk is in memory at once.

    A chunk's gradients are computed beside its loss, from the same logits, so these are computed
    once. Products take `dtype` and sum in float32, as the weight's gradient does over chunks and
    devices.

    A vocabulary that is split over axes other than the batch's stays so: each device has the logits
    of its own part.

    Args:
      x_BLD: [batch, length, model dim], rows split over the batch's mesh axes.
      weight_DV: [model dim, vocab] float32, split in any way.
      targets_BL: [batch, length] int32.
      weights_BL: [batch, length] float32; no gradient goes there.
    Returns:
      [] float32.
    """
    return _run(x_BLD, weight_DV, targets_BL, weights_BL, dtype, gradients=False)[0]


def _forward(x_BLD, weight_DV, targets_BL, weights_BL, dtype):
    loss, gradients = _run(x_BLD, weight_DV, targets_BL, weights_BL, dtype, gradients=True)
    # The weight's is scattered before the layers' backward passes, or it would be whole in these.
    return loss, jax.lax.optimization_barrier(gradients)


def _backward(dtype, kept, dloss):
    del dtype
    return *jax.tree.map(lambda d: (d * dloss).astype(d.dtype), kept), None, None


projected_cross_entropy.defvjp(_forward, _backward)


def _run(x_BLD, weight_DV, targets_BL, weights_BL, dtype, *, gradients):
    """The loss; the gradients of x and weight, if wanted."""
    spec = jax.typeof(weight_DV).sharding.spec
    axes = sharding.split_axes(spec, 1)
    vocab_axes = axes if not set(axes) & set(BATCH_AXES) else ()
    gathered = P(sharding.split_axes(spec, 0), () if vocab_axes else axes)
    gather = functools.partial(sharding.gather_varying, spec=gathered)

    def region(x_BLD, shard, targets_BL, weights_BL):
        whole_DV = gather(shard.astype(dtype))
        tokens, dim = targets_BL.size, x_BLD.shape[-1]
        size = max(1, min(tokens, CHUNK_LOGITS // whole_DV.shape[1]))
        chunks = -(-tokens // size)

        def chunked(x, *rest):
            x = jnp.pad(
                x.reshape(tokens, *rest), ((0, chunks * size - tokens), *[(0, 0)] * len(rest))
            )
            return x.reshape(chunks, size, *rest)

        of_logits = functools.partial(cross_entropy, vocab_axes=vocab_axes)

        def chunk_loss(loss, inputs):
            x_CD, targets_C, weights_C = inputs
            logits_CV = jnp.dot(x_CD, whole_DV, preferred_element_type=jnp.float32)
            return loss + of_logits(logits_CV, targets_C, weights_C), None

        def chunk_gradients(total, inputs):
            loss, dweight_DV = total
            x_CD, targets_C, weights_C = inputs
            logits_CV = jnp.dot(x_CD, whole_DV, preferred_element_type=jnp.float32)
            here, dlogits_CV = jax.value_and_grad(of_logits)(logits_CV, targets_C, weights_C)
            dlogits_CV = dlogits_CV.astype(dtype)
            dx_CD = jnp.dot(dlogits_CV, whole_DV.T, preferred_element_type=jnp.float32)
            dx_CD = jax.lax.psum(dx_CD, vocab_axes)
            dweight_DV += jnp.dot(x_CD.T, dlogits_CV, preferred_element_type=jnp.float32)
            return (loss + here, dweight_DV), dx_CD.astype(x_BLD.dtype)

        def zeros(shape, *axes):
            return jax.lax.pcast(jnp.zeros(shape, jnp.float32), (*BATCH_AXES, *axes), to="varying")

        inputs = chunked(x_BLD.astype(dtype), dim), chunked(targets_BL), chunked(weights_BL)
        if not gradients:
            return jax.lax.psum(jax.lax.scan(chunk_loss, zeros(()), inputs)[0], BATCH_AXES), ()
        start = zeros(()), zeros(whole_DV.shape, *vocab_axes)
        (loss, dweight_DV), dx = jax.lax.scan(chunk_gradients, start, inputs)
        dx_BLD = dx.reshape(-1, dim)[:tokens].reshape(x_BLD.shape)
        dweight = jax.vjp(gather, shard)[1](dweight_DV)[0]
        return jax.lax.psum(loss, BATCH_AXES), (dx_BLD, dweight)

    return jax.shard_map(
        region,
        in_specs=(BATCH, spec, BATCH, BATCH),
        out_specs=(P(), (BATCH, spec) if gradients else ()),
    )(x_BLD, weight_DV, targets_BL, weights_BL)
