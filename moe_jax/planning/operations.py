"""Parameters and operations of a model, counted from its config and its shapes.

An operation is a multiplication or an addition in a matrix product. Norms, rotations, softmax and
the optimizer, a few per entry of what products make, count as none; look-ups make none.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from moe_jax.config import ModelConfig
from moe_jax.planning.weights import GROUPS, Weight, listed

# What the backward pass of attention computes again of the forward one, whatever the policy: times
# the product of queries and keys, and of weights and values (Dao et al. 2022, algorithm 4). The
# kernels have one pass for queries and one for keys and values.
ATTENTION_AGAIN = {"cpu": (1, 0), "gpu": (2, 1), "tpu": (2, 1)}

LATENTS = {"query_down", "kv_down"}
# Of attention, and the stream that the last product enters.
KEPT_RESULTS = LATENTS | {"output"}


class Parameters(NamedTuple):
    """How many there are.

    total: of the main model.
    active: those of them that one token uses.
    mtp: of the modules of multi-token prediction, which are counted in neither.
    by_group, mtp_by_group: the same by `weights.GROUPS`.
    """

    total: int
    active: int
    mtp: int
    by_group: dict[str, int]
    mtp_by_group: dict[str, int]


def count_parameters(parameters: Any, router_bias: Any, config: ModelConfig) -> Parameters:
    """Parameters from their shapes, as the DeepSeek reports count them.

    The active ones leave out the experts that a token does not choose, and the router biases,
    which take part in no product; embedding and head count in both.

    Args:
      parameters, router_bias: trees of arrays or of their shapes.
    """
    return count(listed(parameters, router_bias), config)


def count(weights: Iterable[Weight], config: ModelConfig) -> Parameters:
    """The same of `weights_of`."""
    main: dict[str, int] = dict.fromkeys(GROUPS, 0)
    mtp, biases = dict(main), 0
    for weight in weights:
        of = mtp if weight.stack == "mtp" else main
        of[weight.group] += weight.size
        if of is main and not weight.trained:
            biases += weight.size
    total = sum(main.values())
    unchosen = main["routed"] - _chosen(main["routed"], config)
    return Parameters(total, total - biases - unchosen, sum(mtp.values()), main, mtp)


def _chosen(routed: int, config: ModelConfig) -> int:
    """Of the weights of all routed experts, those of one token's."""
    return routed * config.moe.num_experts_per_tok // config.moe.num_experts


def forward_operations(config: ModelConfig, count: Parameters, length: float) -> dict[str, float]:
    """Operations of a token by group; "scores" are attention's products without weights.

    Multi-token prediction is one group, with its scores and the head, which it reads once more a
    depth.

    Args:
      length: of a row, or of the documents in it where they are masked from one another: a token
        attends to half of them and itself.
    """
    layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    head = _head(config, count)
    of_main = _products(count.by_group, config) | {"head": 2.0 * head}
    scores = sum(score_operations(config, length))
    operations = of_main | {"scores": layers * scores}
    if depth:
        of_mtp = sum(_products(count.mtp_by_group, config).values())
        operations["mtp"] = of_mtp + depth * (scores + 2.0 * head)
    return operations


def _products(by_group: dict[str, int], config: ModelConfig) -> dict[str, float]:
    used = by_group | {"routed": _chosen(by_group["routed"], config)}
    return {g: 2.0 * n for g, n in used.items() if g not in ("embedding", "head", "other")}


def _head(config: ModelConfig, count: Parameters) -> int:
    """Weights of the product that makes logits; a tied table is looked up and is the head."""
    return count.by_group["embedding" if config.tie_word_embeddings else "head"]


def score_operations(config: ModelConfig, length: float) -> tuple[float, float]:
    """Of one layer and token: queries times keys, and weights times values."""
    attention = config.attention
    if attention.kind == "latent":
        query = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        value = attention.v_head_dim
    else:
        query = value = attention.head_dim
    pairs = attention.num_heads * (length + 1) / 2
    return 2.0 * query * pairs, 2.0 * value * pairs


def training_operations(config: ModelConfig, count: Parameters, length: float) -> float:
    """Operations per token, forward and backward, that the model needs; none for recomputation.

    Each product has two of its size in the backward pass.
    """
    return 3.0 * sum(forward_operations(config, count, length).values())


def dense_operations(config: ModelConfig, count: Parameters, length: float) -> float:
    """The same of a dense model with as many parameters and the same attention."""
    unchosen = sum(
        of["routed"] - _chosen(of["routed"], config) for of in (count.by_group, count.mtp_by_group)
    )
    return training_operations(config, count, length) + 6.0 * unchosen


def recomputed_operations(
    config: ModelConfig,
    weights: Iterable[Weight],
    length: float,
    rematerialization: str,
    platform: str,
    parts: int = 1,
    *,
    fp8: bool = False,
) -> dict[str, float]:
    """Operations of a token that the backward pass repeats, by group.

    Under all policies but "none" a layer's products run again, but for those whose results are
    kept or that no gradient asks for: the last of a feed-forward part, whose result only enters
    the stream, save where a module that predicts ahead ends in a norm. `latent` and `minimal` keep
    MLA's latents and the result of attention (docs/rematerialization.md).

    Args:
      parts: in which tokens travel to their experts (`model.moe.exchange_parts`). The barrier
        behind a part holds its results together with the next part's rows, so that the results of
        all but the last part are computed again.
      fp8: with a recipe, "none" repeats the router's and those that attention's inputs come from.
    """
    of_query, of_value = score_operations(config, length)
    query_again, value_again = ATTENTION_AGAIN[platform]
    scores = query_again * of_query + value_again * of_value
    if rematerialization == "full":
        scores += of_query + of_value
    again = {"scores": config.num_hidden_layers * scores}
    if config.num_nextn_predict_layers:
        again["mtp"] = config.num_nextn_predict_layers * scores
    if rematerialization == "none":
        if fp8:
            for weight in weights:
                if weight.group == "router" or (
                    weight.group == "attention" and not KEPT_RESULTS & set(weight.path)
                ):
                    group = "mtp" if weight.stack == "mtp" else weight.group
                    again[group] = again.get(group, 0.0) + 2.0 * weight.size
        return again
    kept = set() if rematerialization == "full" else LATENTS
    for weight in weights:
        group, share = weight.group, 1.0
        if weight.stack is None or group == "other" or kept & set(weight.path):
            continue
        if "down" in weight.path and weight.stack != "mtp":
            share = 1 - 1 / parts if group == "routed" else 0.0
        size = _chosen(weight.size, config) if group == "routed" else weight.size
        group = "mtp" if weight.stack == "mtp" else group
        again[group] = again.get(group, 0.0) + 2.0 * share * size
    return again
