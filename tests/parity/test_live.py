"""Every family, against Hugging Face transformers on new weights, and what is exported to it.

Needs the extra `test-parity` and runs with `pytest -m parity`.
"""

import importlib
import itertools
from pathlib import Path
from typing import Any

import families
import jax
import numpy as np
import pytest
from our_results import by_public_name, loss_and_gradients, packed, write_checkpoint

from moe_jax.interop import huggingface

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4  # of the logits' deviation, of a gradient's norm
SMALLEST_GAP = 1e-4  # between scores, so that rounding cannot flip a choice


@pytest.fixture(scope="session")
def torch_reference() -> Any:
    """Imported only here: other tests need no torch."""
    return importlib.import_module("torch_reference")


@pytest.fixture(params=families.CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path: Path, torch_reference: Any) -> tuple[Any, ...]:
    """Config, transformers' model and results, tokens and our model, of a seed without ties."""
    config = families.CONFIGS[request.param]
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    for seed in itertools.count(100):
        rows = families.tokens(config, seed)
        families.write(tmp_path / "float32", plain, families.weights(config, seed))
        theirs = torch_reference.run(torch_reference.load(tmp_path / "float32"), rows)
        if theirs.gap > SMALLEST_GAP:
            break
    write_checkpoint(tmp_path / "published", config, seed)
    return config, theirs, rows, huggingface.load(tmp_path / "published", dtype="float32")


def close(found: Any, expected: np.ndarray) -> None:
    atol = TOLERANCE * float(expected.std())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_logits_loss_and_gradients(case: tuple[Any, ...], tmp_path: Path) -> None:
    config, theirs, rows, model = case
    close(model(rows), theirs.logits)
    balance_weight = config.get("router_aux_loss_coef", 0.0)
    loss, balance, gradients = loss_and_gradients(model, rows, balance_weight)
    np.testing.assert_allclose(loss, theirs.loss, rtol=1e-5)
    np.testing.assert_allclose(balance, theirs.balance_loss, rtol=1e-5)
    named = by_public_name(model, gradients, tmp_path / "gradients")
    assert named.keys() - theirs.gradients.keys() == {
        name for name in families.shapes(config) if not families.is_parameter(name)
    }
    for name, gradient in theirs.gradients.items():
        distance = np.linalg.norm(named[name] - gradient)
        assert distance <= TOLERANCE * np.linalg.norm(gradient), name


def test_packed_documents_equal_each_alone(case: tuple[Any, ...], torch_reference: Any) -> None:
    _, theirs, rows, model = case
    batch, positions, segment_ids, source = packed(rows)
    is_token = segment_ids > 0
    together = np.asarray(model(batch, positions, segment_ids))
    close(together[is_token], theirs.logits[source, positions][is_token])


def test_an_export_opens_in_transformers_and_the_other_way_round(
    case: tuple[Any, ...], tmp_path: Path, torch_reference: Any
) -> None:
    """Changed weights too: what is written is what the model holds, not what it was read from."""
    _, _, rows, model = case
    model.parameters = jax.tree.map(lambda w: w + 0.01 * w.std(), model.parameters)
    huggingface.save(model, tmp_path / "export")
    exported = torch_reference.load(tmp_path / "export")
    logits = torch_reference.run(exported, rows).logits
    close(model(rows), logits)
    exported.save_pretrained(tmp_path / "theirs")
    close(huggingface.load(tmp_path / "theirs", dtype="float32")(rows), logits)
