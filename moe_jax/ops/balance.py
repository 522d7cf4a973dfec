"""How far routing is from balance: losses, the bias that steers it, and a measure.

Losses of a sequence (DeepSeek) need its tokens only; losses of a batch (Switch, Mixtral, the
router's z-loss) need sums over all devices' tokens of a micro-batch. Each is here without its
weight, and 1 at perfect balance but for the z-loss and Mixtral's, which is experts per token.

Shapes: S sequences, L length, N layers, E experts, K chosen experts per token, D device groups.
"""

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig


def normalized(scores: jax.Array) -> jax.Array:
    """[..., experts] float32 scaled to sum 1 (V3, equation 19); softmax scores already do."""
    return scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)


def sequence_losses(
    scores_SLE: jax.Array, expert_ids_SLK: jax.Array, valid_SL: jax.Array, config: MoEConfig
) -> dict[str, jax.Array]:
    """Each loss per sequence that has a weight in `config`, by its name there: [] float32 sums.

    Args:
      scores_SLE: [sequences, length, experts] float32, unbiased.
      expert_ids_SLK: [sequences, length, top_k] int32, the experts chosen.
      valid_SL: [sequences, length] bool; padding counts nowhere.
    Returns:
      Sums over sequences; one of padding alone adds 0.
    """
    top_k, shares_SLE = config.num_experts_per_tok, normalized(scores_SLE)
    losses = {}
    if config.sequence_loss_weight:
        # Of the unbiased scores, not of the choice that the bias steers (V3, equation 18).
        best_SLK = jax.lax.top_k(jax.lax.stop_gradient(scores_SLE), top_k)[1]
        losses["sequence_loss"] = expert_balance(shares_SLE, best_SLK, valid_SL)
    if config.expert_loss_weight:
        losses["expert_loss"] = expert_balance(shares_SLE, expert_ids_SLK, valid_SL)
    if config.device_loss_weight:
        losses["device_loss"] = device_balance(
            shares_SLE, expert_ids_SLK, valid_SL, config.num_device_groups
        )
    if config.communication_loss_weight:
        losses["communication_loss"] = communication_balance(
            shares_SLE,
            expert_ids_SLK,
            valid_SL,
            config.num_device_groups,
            config.num_limited_groups,
        )
    return {name: jnp.sum(loss_S) for name, loss_S in losses.items()}


def expert_balance(
    shares_SLE: jax.Array, expert_ids_SLK: jax.Array, valid_SL: jax.Array
) -> jax.Array:
    """sum_i f_i P_i for each sequence (V2, section 2.2.3; V3, equations 17 to 20): [S] float32.

    f_i is expert i's part of the choices times experts / top_k, and P_i its mean share.
    """
    f_SE, p_SE = _choices_and_shares(shares_SLE, expert_ids_SLK, valid_SL)
    return jnp.sum(f_SE * p_SE, axis=-1)


def device_balance(
    shares_SLE: jax.Array, expert_ids_SLK: jax.Array, valid_SL: jax.Array, devices: int
) -> jax.Array:
    """sum_i f'_i P'_i over device groups (V2, section 2.2.3, device-level): [S] float32.

    f'_i is the mean of f over the group's experts, and P'_i the sum of their P.
    """
    f_SE, p_SE = _choices_and_shares(shares_SLE, expert_ids_SLK, valid_SL)
    sequences = f_SE.shape[0]
    f_SD = jnp.mean(f_SE.reshape(sequences, devices, -1), axis=-1)
    p_SD = jnp.sum(p_SE.reshape(sequences, devices, -1), axis=-1)
    return jnp.sum(f_SD * p_SD, axis=-1)


def communication_balance(
    shares_SLE: jax.Array,
    expert_ids_SLK: jax.Array,
    valid_SL: jax.Array,
    devices: int,
    limit: int,
) -> jax.Array:
    """sum_i f''_i P''_i over device groups (V2, section 2.2.3, communication): [S] float32.

    f''_i is the part of tokens sent to group i, once each, times devices / limit, `limit` being the
    most groups that a token may go to.
    """
    experts = shares_SLE.shape[-1]
    _, p_SE = _choices_and_shares(shares_SLE, expert_ids_SLK, valid_SL)
    device_SLK = expert_ids_SLK * devices // experts
    sent_SLD = jnp.any(device_SLK[..., None] == jnp.arange(devices), axis=2)
    f_SD = _mean_over_tokens(sent_SLD, valid_SL) * devices / limit
    p_SD = jnp.sum(p_SE.reshape(len(p_SE), devices, -1), axis=-1)
    return jnp.sum(f_SD * p_SD, axis=-1)


def _choices_and_shares(
    shares_SLE: jax.Array, expert_ids_SLK: jax.Array, valid_SL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """f and P of each sequence and expert, [S, E] float32 each."""
    experts, top_k = shares_SLE.shape[-1], expert_ids_SLK.shape[-1]
    chosen_SLE = jnp.any(expert_ids_SLK[..., None] == jnp.arange(experts), axis=2)
    f_SE = _mean_over_tokens(chosen_SLE, valid_SL) * experts / top_k
    return f_SE, _mean_over_tokens(shares_SLE, valid_SL)


def _mean_over_tokens(x_SLE: jax.Array, valid_SL: jax.Array) -> jax.Array:
    valid = valid_SL[..., None].astype(jnp.float32)
    return jnp.sum(x_SLE * valid, axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1.0)


def batch_losses(
    load_NE: jax.Array,
    share_NE: jax.Array,
    z_N: jax.Array,
    tokens: jax.Array,
    config: MoEConfig,
) -> dict[str, jax.Array]:
    """Each loss per micro-batch that has a weight in `config`, by its name there: [] float32.

    Args:
      load_NE: [layers, experts] int32, tokens that chose each expert, over all devices.
      share_NE: [layers, experts] float32, sums over the same tokens of the normalised scores.
      z_N: [layers] float32, sums of the squared log-partition of the router's logits.
      tokens: that were routed, [] if as many in every layer, or [layers].
    """
    tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
    experts = load_NE.shape[-1]
    f_NE, p_NE = load_NE / tokens[..., None], share_NE / tokens[..., None]
    losses = {}
    if config.switch_loss_weight:
        # Switch Transformer, equations 4 to 6, summed over layers; f counts choices per token.
        losses["switch_loss"] = experts * jnp.sum(f_NE * p_NE) / config.num_experts_per_tok
    if config.mixtral_loss_weight:
        # As Mixtral's public code has it: the routing of all layers is pooled first.
        pooled = jnp.mean(f_NE, axis=0) * jnp.mean(p_NE, axis=0)
        losses["mixtral_loss"] = experts * jnp.sum(pooled)
    if config.z_loss_weight:
        # ST-MoE, equation 5, summed over layers.
        losses["z_loss"] = jnp.sum(z_N / tokens)
    return losses


def entropy(share_LE: jax.Array) -> jax.Array:
    """[layers] float32: of a router's mean scores, as a share of the largest entropy there is.

    1 where all experts score alike, 0 where one has it all.

    Args:
      share_LE: [layers, experts] float32, sums of normalised scores.
    """
    p_LE = share_LE / jnp.maximum(jnp.sum(share_LE, axis=-1, keepdims=True), 1e-30)
    nats_L = -jnp.sum(p_LE * jnp.log(jnp.maximum(p_LE, 1e-30)), axis=-1)
    return nats_L / jnp.log(jnp.float32(max(share_LE.shape[-1], 2)))


def max_violation(load_NE: jax.Array) -> jax.Array:
    """MaxVio = (max load - mean load) / mean load, per layer.

    Args:
      load_NE: [layers, experts] int32.
    Returns:
      [layers] float32; 0 where nothing was routed.
    """
    mean = jnp.mean(load_NE.astype(jnp.float32), axis=-1)
    return (jnp.max(load_NE, axis=-1) - mean) / jnp.maximum(mean, 1e-20)


def update_bias(bias_NE: jax.Array, load_NE: jax.Array, speed: jax.Array | float) -> jax.Array:
    """Raises the bias of under-loaded experts by `speed` and lowers that of over-loaded ones.

    Auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2); once an update, from the load of
    the whole global batch.

    Args:
      bias_NE: [layers, experts] float32.
      load_NE: [layers, experts] int32.
      speed: gamma.
    """
    load = load_NE.astype(jnp.float32)
    return bias_NE + speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
