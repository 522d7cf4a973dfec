"""A checkpoint folder run by Hugging Face transformers, with results under public tensor names."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

# Its way of loading is reported through progress bars and a table of each key; it is checked here.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity(logging.ERROR)


class Reference(NamedTuple):
    """What a model gives for a batch of tokens.

    loss: [] mean over next tokens.
    balance_loss: [] Mixtral's, without its coefficient; 0 elsewhere.
    gradients: of loss + coefficient * balance_loss, by public tensor name.
    gap: the smallest distance of two scores whose order decides which experts are chosen.
    """

    logits: np.ndarray
    loss: float
    balance_loss: float
    gradients: dict[str, np.ndarray]
    gap: float


def load(folder: Path, **overrides: Any) -> transformers.PreTrainedModel:
    """The model in float32; every tensor of the folder is used, and none is missing."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **overrides,
    )
    assert not any(report.values()), report
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model.eval()


def run(model: transformers.PreTrainedModel, tokens: np.ndarray) -> Reference:
    gates: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, output, name=name: gates.update({name: output[0].detach()})
        )
        for name, module in routers(model).items()
    ]
    config, ids = model.config, torch.from_numpy(tokens).long()
    is_mixtral = config.model_type == "mixtral"
    inputs = {"output_router_logits": True} if is_mixtral else {}
    model.zero_grad()
    result = model(input_ids=ids, labels=ids, use_cache=False, **inputs)
    result.loss.backward()
    for hook in hooks:
        hook.remove()
    balance = float(result.aux_loss.detach()) if is_mixtral else 0.0
    coefficient = config.router_aux_loss_coef if is_mixtral else 0.0
    return Reference(
        logits=result.logits.detach().numpy(),
        loss=float(result.loss.detach()) - coefficient * balance,
        balance_loss=balance,
        gradients=_gradients(model),
        gap=min((_gap(model, name, gate) for name, gate in gates.items()), default=float("inf")),
    )


def routers(model: transformers.PreTrainedModel) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith("mlp.gate")}


class Choice(NamedTuple):
    """A router's choice, recomputed step by step.

    scores, steered: [tokens, experts], without and with bias.
    groups: [tokens, groups], their scores; None without groups.
    kept: [tokens, experts] bool, experts of the best groups.
    """

    scores: torch.Tensor
    steered: torch.Tensor
    groups: torch.Tensor | None
    kept: torch.Tensor


def choice(model: transformers.PreTrainedModel, name: str, logits: torch.Tensor) -> Choice:
    config = model.config
    bias = getattr(model.get_submodule(name), "e_score_correction_bias", None)
    scores = logits.softmax(-1) if bias is None else logits.sigmoid()
    steered = scores if bias is None else scores + bias
    if bias is None and getattr(config, "topk_method", "greedy") == "greedy":
        return Choice(scores, steered, None, torch.ones_like(scores, dtype=torch.bool))
    grouped = steered.view(len(steered), config.n_group, -1)
    groups = grouped.topk(1 if bias is None else 2, dim=-1)[0].sum(-1)
    best = torch.zeros_like(groups).scatter(1, groups.topk(config.topk_group)[1], 1).bool()
    return Choice(scores, steered, groups, best.repeat_interleave(grouped.shape[-1], 1))


def _gap(model: transformers.PreTrainedModel, name: str, logits: torch.Tensor) -> float:
    def between(scores: torch.Tensor, count: int) -> float:
        """The last that is taken, from the first that is not."""
        best = scores.sort(dim=-1, descending=True)[0]
        return float((best[:, count - 1] - best[:, count]).min())

    made, config = choice(model, name, logits), model.config
    steered = made.steered.masked_fill(~made.kept, float("-inf"))
    gap = between(steered, config.num_experts_per_tok)
    return gap if made.groups is None else min(gap, between(made.groups, config.topk_group))


def _gradients(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """By public tensor name: transformers holds all experts of a layer in two tensors."""
    mixtral = model.config.model_type == "mixtral"
    gate, down, up = ("w1", "w2", "w3") if mixtral else ("gate_proj", "down_proj", "up_proj")
    result = {}
    for name, parameter in model.named_parameters():
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        gradient = parameter.grad.numpy()
        prefix, _, last = name.rpartition(".experts.")
        if not prefix:
            result[name] = gradient
            continue
        for expert, slice_ in enumerate(gradient):
            if last == "down_proj":
                named = {down: slice_}
            else:
                named = dict(zip((gate, up), np.split(slice_, 2), strict=True))
            for projection, values in named.items():
                result[f"{prefix}.experts.{expert}.{projection}.weight"] = values
    return result
