"""Weights that stay in FP8 in memory: the same numbers as widened ones, in fewer bytes."""

from pathlib import Path

import folders
import jax
import numpy as np
import pytest
from emulated import make_mesh

from moe_jax.config import UserError
from moe_jax.inference.generation import Generator
from moe_jax.interop import huggingface
from moe_jax.interop.lazy import flatten
from moe_jax.ops.fp8_weight import Fp8Weight

# Dims that end within a block, and heads that begin within one.
RAW = folders.V3 | {
    "num_hidden_layers": 2,
    "hidden_size": 144,
    "moe_intermediate_size": 132,
    "q_lora_rank": 132,
    "qk_nope_head_dim": 70,
    "v_head_dim": 66,
}
TOKENS = np.random.default_rng(0).integers(0, RAW["vocab_size"], (3, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8")
    wide = huggingface.load(folders.write(path / "wide", RAW), "float32")
    huggingface.save(wide, path / "fp8", "float8")
    return path / "fp8"


@pytest.mark.parametrize(
    ("dtype", "sizes"), [("bfloat16", {}), ("float32", {"fsdp": 2, "expert": 2})], ids=str
)
def test_logits_and_text_are_those_of_widened_weights(
    folder: Path, dtype: str, sizes: dict[str, int]
) -> None:
    mesh = make_mesh(**sizes)
    wide, kept = (huggingface.load(folder, dtype, mesh, keep_fp8=keep) for keep in (False, True))
    np.testing.assert_array_equal(kept(TOKENS), wide(TOKENS))
    if sizes:
        prompts = [TOKENS[0, :4], TOKENS[1]]
        texts = [Generator(m, slots=16, speculative=True)(prompts, 6) for m in (kept, wide)]
        assert texts[0] == texts[1]


def test_what_the_folder_has_in_fp8_takes_a_byte_a_weight(folder: Path) -> None:
    kept = huggingface.load(folder, "bfloat16", make_mesh(fsdp=2, expert=2), keep_fp8=True)
    wide = huggingface.load(folder, "bfloat16")
    leaves = jax.tree.leaves(kept.parameters, is_leaf=lambda x: isinstance(x, Fp8Weight))
    narrow = 0
    for leaf, other in zip(leaves, flatten(wide.parameters).values(), strict=True):
        if not isinstance(leaf, Fp8Weight):
            assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
            continue
        assert leaf.values.shape == other.shape and leaf.values.nbytes == other.size
        assert leaf.scales.size < leaf.values.size / 64
        narrow += leaf.values.size
    assert narrow > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(wide.parameters))
    # Each device has a part.
    gate = kept.parameters["moe_blocks"]["moe"]["gate"]
    assert gate.values.addressable_shards[0].data.size == gate.values.size / 4
    assert gate.scales.addressable_shards[0].data.size == gate.scales.size / 2


def test_what_is_not_in_fp8_or_cannot_be_saved_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no weights in FP8 to keep so"):
        huggingface.load(folder.parent / "wide", keep_fp8=True)
    kept = huggingface.load(folder, keep_fp8=True)
    with pytest.raises(UserError, match="whose weights stay in FP8 cannot be saved"):
        huggingface.save(kept, tmp_path / "copy")
