"""Every family, against what Hugging Face transformers gave for the same tiny checkpoint.

make_references.py says how the stored numbers came about; test_live.py compares with transformers
itself.
"""

from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import make_mesh
from families import CONFIGS, directions, tokens
from our_results import by_public_name, loss_and_gradients, packed, write_checkpoint

from moe_jax.interop import huggingface

TOLERANCE = 1e-4  # of the logits' deviation, of a gradient's norm


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("references") / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_equals_its_reference(name: str, tmp_path: Path) -> None:
    config, reference = CONFIGS[name], stored(name)
    seed = int(reference["seed"])
    rows = tokens(config, seed)
    write_checkpoint(tmp_path / "checkpoint", config, seed)
    model = huggingface.load(tmp_path / "checkpoint", dtype="float32")
    spread = float(reference["logits"].std())
    logits = model(rows)
    chex.assert_type(logits, jnp.float32)
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=TOLERANCE * spread)

    batch, positions, segment_ids, source = packed(rows)
    is_token = segment_ids > 0
    together = np.asarray(model(batch, positions, segment_ids))[is_token]
    alone = reference["logits"][source, positions][is_token]
    np.testing.assert_allclose(together, alone, rtol=0, atol=TOLERANCE * spread)

    balance_weight = config.get("router_aux_loss_coef", 0.0)
    loss, balance, gradients = loss_and_gradients(model, rows, balance_weight)
    np.testing.assert_allclose(loss, reference["loss"], rtol=1e-5)
    np.testing.assert_allclose(balance, reference["balance_loss"], rtol=1e-5)

    named = by_public_name(model, gradients, tmp_path / "gradients")
    along = directions(config)
    assert named.keys() >= along.keys()
    found = [named[name].astype(np.float64) for name in along]
    # A parameter without gradient, that of an expert without tokens, must have none here either.
    norms = reference["norms"]
    np.testing.assert_array_less(
        np.abs([np.linalg.norm(g) for g in found] - norms), TOLERANCE * norms + 1e-30
    )
    products = [np.vdot(g, d) for g, d in zip(found, along.values(), strict=True)]
    np.testing.assert_array_less(
        np.abs(products - reference["products"]), TOLERANCE * norms + 1e-30
    )


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_a_family_on_a_mesh_equals_its_reference(name: str, tmp_path: Path) -> None:
    config, reference = CONFIGS[name], stored(name)
    seed = int(reference["seed"])
    write_checkpoint(tmp_path / "checkpoint", config, seed)
    mesh = make_mesh(fsdp=2, expert=2)
    logits = huggingface.load(tmp_path / "checkpoint", dtype="float32", mesh=mesh)(
        tokens(config, seed)
    )
    atol = TOLERANCE * float(reference["logits"].std())
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=atol)
