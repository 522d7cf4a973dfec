"""Writes references/*.npz: what Hugging Face transformers gives for each tiny model of families.py.

A file holds the seed of weights and tokens, logits, the mean loss over next tokens, Mixtral's
balance loss, and of the gradient of each parameter its norm and its product with a fixed random
direction, in the order of `families.directions`. Made on CPU, with Python 3.11, in an environment
of its own, which the tests do not need:

    pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    python tests/parity/make_references.py

Every setting of a config must show in the logits, and no choice of experts may be close. Weights in
FP8 are given to transformers in float32, since it takes rows and columns beyond whole blocks wrong.
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
import torch_reference
import transformers

FOLDER = Path(__file__).with_name("references")
TOLERANCE = 1e-4  # of the logits' deviation: the tests'
SMALLEST_GAP = 1e-4  # between scores, so that rounding cannot flip a choice


def open_model(config: dict[str, Any], weights: families.Tensors) -> transformers.PreTrainedModel:
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        families.write(Path(folder), config, weights)
        return torch_reference.load(Path(folder))


def variants(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config with one setting changed at a time."""
    family = config["model_type"]
    changes: dict[str, Any] = {"rms_norm_eps": 2e-2}
    if "topk_group" in config and config["n_group"] > 1:
        changes["topk_group"] = config["n_group"]
        changes["num_experts_per_tok"] = config["num_experts_per_tok"] - 1
    if "routed_scaling_factor" in config:
        changes["routed_scaling_factor"] = 1.25 * config["routed_scaling_factor"]
    if family == "deepseek_v3":
        changes |= {"norm_topk_prob": not config["norm_topk_prob"], "rope_interleave": False}
    if config.get("topk_method") == "group_limited_greedy":
        changes["topk_method"] = "greedy"
    if "rope_theta" in config:
        changes["rope_theta"] = 1.25 * config["rope_theta"]
    for key, value in changes.items():
        yield key, {**config, key: value}
    for place in ("rope_scaling", "rope_parameters"):
        rope = dict(config.get(place) or {})
        if "yarn" in rope.values():
            rope.setdefault("truncate", True)
        for key, value in rope.items():
            if isinstance(value, str):
                changed = "default"
            else:
                changed = not value if isinstance(value, bool) else type(value)(value / 2)
            if changed != value:
                yield f"{place}.{key}", {**config, place: {**rope, key: changed}}


def check_settings(
    config: dict[str, Any], weights: families.Tensors, tokens: np.ndarray, logits: np.ndarray
) -> None:
    """Each setting must move the logits by far more than the tests allow."""

    def moved(label: str, model: transformers.PreTrainedModel) -> None:
        with torch.no_grad():
            other = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits
        distance = float(np.abs(other.numpy() - logits).max() / logits.std())
        print(f"  {label}: logits move by {distance:.2g} deviations")
        assert distance > 30 * TOLERANCE, label

    for label, other in variants(config):
        moved(label, open_model(other, weights))
    model = open_model(config, weights)
    latents = [m for name, m in model.named_modules() if name.endswith("a_layernorm")]
    if latents and "quantization_config" not in config:
        for norm in latents:
            norm.variance_epsilon = 1e-5
        moved("epsilon of latents", model)
    if config["model_type"] == "deepseek_v3":
        biases = {name: 0 * w for name, w in weights.items() if not families.is_parameter(name)}
        moved("router bias", open_model(config, weights | biases))


def check_routing(model: transformers.PreTrainedModel, tokens: np.ndarray) -> None:
    """Choices must be varied, and other rules must make other choices."""
    logits: dict[str, torch.Tensor] = {}
    for name, module in torch_reference.routers(model).items():
        module.register_forward_hook(
            lambda module, args, output, name=name: logits.update({name: output[0].detach()})
        )
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens).long(), use_cache=False)
    top_k, config = getattr(model.config, "num_experts_per_tok", 0), model.config
    for name, values in logits.items():
        made = torch_reference.choice(model, name, values)

        def chosen(scores: torch.Tensor) -> torch.Tensor:
            return scores.topk(top_k, dim=-1)[1].sort(dim=-1)[0]

        taken = chosen(made.steered.masked_fill(~made.kept, float("-inf")))
        used, experts = len(taken.unique()), values.shape[1]
        print(f"  {name}: {used} of {experts} experts used")
        assert used > experts / 2, name
        others = {}
        if made.groups is not None:
            per_group = made.steered.view(*made.groups.shape, -1)
            best = per_group.topk(2 if config.model_type == "deepseek_v2" else 1, dim=-1)[0]
            groups = best.sum(-1).topk(config.topk_group)[1]
            kept = torch.zeros_like(made.groups).scatter(1, groups, 1).bool()
            kept = kept.repeat_interleave(per_group.shape[-1], 1)
            others["groups by one or two best"] = made.steered.masked_fill(~kept, float("-inf"))
            others["no groups"] = made.steered
        if config.model_type == "deepseek_v3":
            others["masking with 0"] = made.steered.masked_fill(~made.kept, 0.0)
            others["no bias"] = made.scores.masked_fill(~made.kept, float("-inf"))
        for label, scores in others.items():
            differing = int((chosen(scores) != taken).any(-1).sum())
            print(f"    {label}: {differing} of {len(taken)} tokens choose otherwise")
            assert differing > 0, label


def make(name: str, config: dict[str, Any]) -> None:
    directions = families.directions(config)
    for seed in itertools.count():
        weights, tokens = families.weights(config, seed), families.tokens(config, seed)
        model = open_model(config, weights)
        result = torch_reference.run(model, tokens)
        if result.gap > SMALLEST_GAP:
            break
    print(f"{name}: seed {seed}, smallest gap {result.gap:.2g}")
    check_settings(config, weights, tokens, result.logits)
    check_routing(model, tokens)
    assert set(result.gradients) == set(directions)
    gradients = [(result.gradients[key].astype(np.float64), d) for key, d in directions.items()]
    norms = np.array([np.linalg.norm(g) for g, _ in gradients])
    unused = [key for key, norm in zip(directions, norms, strict=True) if norm == 0]
    assert all(".experts." in key for key in unused), unused
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(
        path,
        seed=seed,
        logits=result.logits,
        loss=result.loss,
        balance_loss=result.balance_loss,
        norms=norms,
        products=np.array([np.vdot(g, d) for g, d in gradients]),
    )
    print(
        f"  loss {result.loss:.4f}, logits' deviation {result.logits.std():.3f}, "
        f"{len(norms)} gradients, {len(unused)} of them of experts unused; "
        f"{path.stat().st_size} bytes"
    )


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in families.CONFIGS.items():
        make(*case)
