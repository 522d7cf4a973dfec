"""Multi-token prediction of depth 2 against Hugging Face transformers, which drafts with it.

Needs the extra `test-parity` and runs with `pytest -m parity`.
"""

import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from folders import V3, tensors, write

from moe_jax.interop import huggingface
from moe_jax.models.language_model import LanguageModel

pytestmark = pytest.mark.parity

RAW = V3 | {"num_nextn_predict_layers": 2}
TOKENS = np.random.default_rng(5).integers(0, RAW["vocab_size"], (3, 10)).astype(np.int32)


def _ours(model: LanguageModel) -> np.ndarray:
    """Logits [depth, batch, length, vocab]."""

    def run(parameters, router_bias, *inputs):
        decoder = nnx.merge(model.graphdef, parameters, router_bias)
        hidden, _ = decoder.hidden_states(*inputs)
        return decoder.logits(decoder.predict_ahead(hidden, *inputs).hidden_KBLD)

    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    inputs = [model.place(x) for x in (TOKENS, np.ones_like(TOKENS), positions)]
    with jax.set_mesh(model.mesh):
        return np.asarray(jax.jit(run)(model.parameters, model.router_bias, *inputs))


def _theirs(folder: Path, monkeypatch: Any) -> list[np.ndarray]:
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    layers = importlib.import_module("transformers.modeling_layers")
    # The released file has one such layer, number 61, and that is the one that is known there.
    monkeypatch.setattr(
        transformers.DeepseekV3ForCausalLM,
        "_keys_to_ignore_on_load_unexpected",
        [r"model\.layers\.3\..*", r"model\.layers\.4\..*"],
    )
    main, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    main.set_experts_implementation("eager")
    ahead = layers.MtpModel.from_pretrained(main).float().eval()
    ids = torch.from_numpy(TOKENS).long()
    found = []
    with torch.no_grad():
        hidden = main.model(input_ids=ids, use_cache=False).last_hidden_state
        for k in (1, 2):
            positions = torch.arange(ids.shape[1] - k)[None]
            hidden = ahead.forward_layer(k - 1, hidden[:, :-1], positions, None, ids[:, k:])
            found.append(ahead.shared_head(hidden).numpy())
    return found


def test_both_depths_give_the_same_logits(tmp_path: Path, monkeypatch: Any) -> None:
    values = tensors(RAW)
    for name, value in values.items():
        if name.endswith("norm.weight"):
            value += 1.0
    folder = write(tmp_path / "source", RAW, values)
    model = huggingface.load(folder, "float32")
    huggingface.save(model, tmp_path / "export")
    ours = _ours(model)
    for path in (folder, tmp_path / "export"):
        for k, expected in enumerate(_theirs(path, monkeypatch), start=1):
            np.testing.assert_allclose(
                ours[k - 1, :, :-k], expected, rtol=0, atol=1e-4 * expected.std()
            )
