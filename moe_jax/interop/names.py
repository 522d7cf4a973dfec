"""Which tensors of a Hugging Face folder each array of ours is made of.

A linear weight is [out, in] there and [*in_dims, *out_dims] here; layers, and experts in them, are
tensors of their own there and leading dims here.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.interop.lazy import Index, Lazy, bounds

Path = tuple[str, ...]


class Part(NamedTuple):
    """One tensor of a Hugging Face folder as part of an array of ours.

    path: of our array, `parameters` or `router_bias` first.
    at: indices of its leading dims.
    num_in_dims: of the dims behind them, how many are summed over; None for what is no product.
    is_linear: a weight that the public FP8 form has in FP8.
    """

    path: Path
    at: tuple[int, ...]
    num_in_dims: int | None = None
    is_linear: bool = False


def parts(config: ModelConfig) -> dict[str, Part]:
    """Every tensor of the model, in the order of the layers."""
    top = ("parameters",)
    found = {"model.embed_tokens.weight": Part((*top, "embedding", "weight"), ())}
    dense = config.first_k_dense_replace
    for i in range(config.num_hidden_layers):
        stack, at = ("dense_blocks", i) if i < dense else ("moe_blocks", i - dense)
        found |= _block(config, f"model.layers.{i}.", (stack,), at, routed=i >= dense)
    for k in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + k}."
        for theirs, ours in (
            ("enorm", "embedding_norm"),
            ("hnorm", "hidden_norm"),
            ("shared_head.norm", "norm"),
        ):
            found[f"{prefix}{theirs}.weight"] = Part((*top, "mtp", ours, "scale"), (k,))
        found[f"{prefix}eh_proj.weight"] = Part((*top, "mtp", "projection", "weight"), (k,), 1)
        routed = config.num_hidden_layers > dense
        found |= _block(config, prefix, ("mtp", "block"), k, routed=routed)
    found["model.norm.weight"] = Part((*top, "norm", "scale"), ())
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = Part((*top, "head", "weight"), (), 1)
    return found


def repeated(config: ModelConfig) -> dict[str, str]:
    """Tensors that a file may repeat, with the name of the one that they must equal."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    found = {"lm_head.weight": head} if config.tie_word_embeddings else {}
    for k in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + k}."
        found[f"{prefix}embed_tokens.weight"] = "model.embed_tokens.weight"
        found[f"{prefix}shared_head.head.weight"] = head
    return found


def _block(
    config: ModelConfig, prefix: str, stack: Path, layer: int, *, routed: bool
) -> dict[str, Part]:
    found: dict[str, Part] = {}

    def norm(theirs: str, *ours: str) -> None:
        path = ("parameters", *stack, *ours, "scale")
        found[f"{prefix}{theirs}.weight"] = Part(path, (layer,))

    def linear(theirs: str, *ours: str, at: tuple[int, ...] = (), num_in_dims: int = 1) -> None:
        path = ("parameters", *stack, *ours)
        part = Part(path, (layer, *at), num_in_dims, is_linear=True)
        found[f"{prefix}{theirs}.weight"] = part

    norm("input_layernorm", "attention_norm")
    norm("post_attention_layernorm", "mlp_norm")
    if config.attention.kind == "latent":
        if config.attention.q_lora_rank is None:
            linear("self_attn.q_proj", "attention", "query", "weight")
        else:
            linear("self_attn.q_a_proj", "attention", "query_down", "weight")
            norm("self_attn.q_a_layernorm", "attention", "query_norm")
            linear("self_attn.q_b_proj", "attention", "query_up", "weight")
        linear("self_attn.kv_a_proj_with_mqa", "attention", "kv_down", "weight")
        norm("self_attn.kv_a_layernorm", "attention", "kv_norm")
        linear("self_attn.kv_b_proj", "attention", "kv_up", "weight")
    else:
        for name in ("query", "key", "value"):
            linear(f"self_attn.{name[0]}_proj", "attention", name, "weight")
    linear("self_attn.o_proj", "attention", "output", "weight", num_in_dims=2)

    three = ("gate", "up", "down")
    if not routed:
        for name in three:
            linear(f"mlp.{name}_proj", "mlp", name, "weight")
        return found
    is_mixtral = config.attention.kind == "grouped_query"
    moe = "block_sparse_moe" if is_mixtral else "mlp"
    router = Part(("parameters", *stack, "moe", "router", "weight"), (layer,), 1)
    found[f"{prefix}{moe}.gate.weight"] = router
    if config.moe.topk_method == "noaux_tc":
        bias = Part(("router_bias", *stack, "moe", "router", "bias"), (layer,))
        found[f"{prefix}{moe}.gate.e_score_correction_bias"] = bias
    theirs = {"gate": "w1", "up": "w3", "down": "w2"} if is_mixtral else {}
    for expert, name in itertools.product(range(config.moe.num_experts), three):
        file_name = theirs.get(name, f"{name}_proj")
        linear(f"{moe}.experts.{expert}.{file_name}", "moe", name, at=(expert,))
    if config.moe.num_shared_experts:
        for name in three:
            linear(f"{moe}.shared_experts.{name}_proj", "moe", "shared", name, "weight")
    return found


def tensor_shape(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor there, given that of our array."""
    rest = shape[len(part.at) :]
    if part.num_in_dims is None:
        return rest
    return math.prod(rest[part.num_in_dims :]), math.prod(rest[: part.num_in_dims])


def to_tensor(part: Part, lazy: Lazy) -> np.ndarray:
    """A whole tensor as it is there, of our array."""
    index = [slice(i, i + 1) for i in part.at]
    index += [slice(0, size) for size in lazy.shape[len(part.at) :]]
    value = lazy.read(tuple(index))
    if part.num_in_dims is None:
        return value.reshape(lazy.shape[len(part.at) :])
    return value.reshape(tensor_shape(part, lazy.shape)[::-1]).T


def from_tensors(
    shape: tuple[int, ...],
    dtype: np.dtype,
    pieces: dict[tuple[int, ...], tuple[str, Part]],
    read: Callable[..., np.ndarray],
) -> Lazy:
    """Our array, of tensors that `read(name, *slices)` gives in part.

    Args:
      pieces: name and part by the indices of leading dims; all parts are of one array.
    """
    part = next(iter(pieces.values()))[1]
    leading = len(part.at)

    def lazy_read(index: Index) -> np.ndarray:
        corners = bounds(index, shape)
        result = np.empty([stop - start for start, stop in corners], dtype)
        rest, rest_shape = corners[leading:], shape[leading:]
        for at in itertools.product(*(range(*corner) for corner in corners[:leading])):
            name, _ = pieces[at]
            value = _read_one(part.num_in_dims, rest, rest_shape, lambda *s, n=name: read(n, *s))
            result[tuple(i - start for i, (start, _) in zip(at, corners, strict=False))] = value
        return result

    return Lazy(shape, dtype, lazy_read)


def _read_one(
    num_in_dims: int | None,
    corners: list[tuple[int, int]],
    shape: tuple[int, ...],
    read: Callable[..., np.ndarray],
) -> np.ndarray:
    """The part of one tensor, in our dims, that lies in `corners`."""
    sizes = [stop - start for start, stop in corners]
    if num_in_dims is None:
        return read(*(slice(*corner) for corner in corners))
    groups = (slice(num_in_dims), slice(num_in_dims, None))
    flat = [_flat(corners[group], shape[group]) for group in groups]
    if None not in flat:
        columns, rows = (slice(*run) for run in flat if run is not None)
        return read(rows, columns).T.reshape(sizes)
    value = read(*(slice(0, math.prod(shape[group])) for group in reversed(groups)))
    return value.T.reshape(shape)[tuple(slice(*corner) for corner in corners)]


def _flat(corners: list[tuple[int, int]], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The run that these corners are of the flattened dims; None if they are no single run."""
    inner = math.prod(shape[1:])
    if any(corner != (0, size) for corner, size in zip(corners[1:], shape[1:], strict=True)):
        return None
    return corners[0][0] * inner, corners[0][1] * inner


def by_array(found: dict[str, Part]) -> dict[Path, dict[tuple[int, ...], tuple[str, Part]]]:
    """Names and parts of each of our arrays, by the indices of its leading dims."""
    grouped: dict[Path, dict[tuple[int, ...], tuple[str, Part]]] = {}
    for name, part in found.items():
        grouped.setdefault(part.path, {})[part.at] = (name, part)
    return grouped
