"""The command, as a person runs it, on a checkpoint of training's own kind."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.config import AttentionConfig, Config, ModelConfig, MoEConfig
from moe_jax.fields import to_dict
from moe_jax.interop import manifest
from moe_jax.interop.huggingface import one_device
from moe_jax.interop.lazy import from_array
from moe_jax.interop.orbax_files import write_checkpoint
from moe_jax.models.language_model import abstract_weights

ROOT = Path(moe_jax.__path__[0]).parent
MODEL = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=24,
    num_nextn_predict_layers=1,
    attention=AttentionConfig(num_heads=2, q_lora_rank=8, kv_lora_rank=8),
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=8),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with a head that writes small letters alone."""
    rng = np.random.default_rng(0)
    trees = dict(
        zip(("parameters", "router_bias"), abstract_weights(MODEL, one_device()), strict=True)
    )
    weights = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), trees)
    norm = weights["parameters"]["norm"]["scale"]
    norm[:] = 1.0
    head = weights["parameters"]["head"]["weight"]
    head[:, : ord("a")] = head[:, ord("z") + 1 :] = 0.0
    path = tmp_path_factory.mktemp("runs") / "checkpoints" / "7"
    path.parent.mkdir()
    config = to_dict(Config(model=MODEL))
    write_checkpoint(
        path, config, jax.tree.map(lambda x: from_array(jax.numpy.asarray(x)), weights)
    )
    manifest.write(path)  # as a run does, whose newest whole checkpoint is looked for
    return path.parent.parent


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_jax.generate", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def _text(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_the_same_text_step_by_step_and_with_drafts(checkpoint: Path) -> None:
    shared = [f"--checkpoint={checkpoint}", "--prompt=def ", "--max_new_tokens=9"]
    shared += ["--dtype=float32"]
    plain = _start(*shared, "--temperature=0")
    drafted = _start(*shared, "--speculative", "--mesh=fsdp=2,expert=2")
    lines, other = (_text(process).splitlines() for process in (plain, drafted))
    assert lines[:3] == [
        "platform: cpu, 1 emulated devices",
        "cache       192 bytes per token; 2.6 KiB for 1 row of 14",
        "            1,024 bytes, 5.3x, with keys and values of all 2 heads",
    ]
    assert lines[3].startswith("compiled    in ") and lines[4] == lines[6] == ""
    assert lines[5].startswith("def ") and len(lines[5]) == 4 + 9 and lines[5][4:].isalpha()
    assert lines[7].startswith("tokens      9 in ") and lines[7].endswith(" tokens/s")
    assert len(lines) == 8
    assert other[5] == lines[5]
    assert other[8].startswith("drafts      ") and other[8].endswith("%)")


def test_several_prompts_each_to_its_end(checkpoint: Path) -> None:
    shared = [f"--checkpoint={checkpoint}", "--temperature=0", "--max_new_tokens=5"]
    prompts = ["--prompt=ab", "--prompt=def "]
    process = _start(*shared, *prompts, "--mesh=expert=2", "--redundant_experts=2")
    whole = _text(process).splitlines()
    assert whole[3].startswith("experts     4, and 2 redundant: fullest device ")
    titles = whole.index("--- prompt 1 ---"), whole.index("--- prompt 2 ---")
    first, second = (whole[title + 1] for title in titles)
    assert first.startswith("ab") and second.startswith("def ")
    assert [len(first), len(second)] == [7, 9]

    # Stopped before its third letter, or sooner if the letter comes sooner.
    letter = second[6]
    ids = ",".join(str(token) for token in [256, *b"def "])
    stopped = _text(_start(*shared, f"--prompt_ids={ids}", f"--stop={letter}")).splitlines()
    assert stopped[5] == "def " + second[4 : second.index(letter, 4)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt=a"], "--checkpoint is missing; try --checkpoint=runs/tiny"),
        (["--checkpoint=/gone", "--prompt=a"], "there is no checkpoint at /gone"),
        (["--checkpoint={0}"], "there is no prompt; give --prompt, --prompt_ids or --prompt_file"),
        (
            ["--checkpoint={0}", "--prompt_ids=1,264"],
            "the prompt has the token id 264; ids of this model are 0 to 263",
        ),
        (
            ["--checkpoint={0}", "--prompt=a", "--dtype=float16"],
            "flag --dtype=float16: value should be one of <float32|bfloat16>",
        ),
    ],
)
def test_a_mistake_is_one_sentence(checkpoint: Path, arguments: list[str], sentence: str) -> None:
    process = _start(*(argument.format(checkpoint) for argument in arguments))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (2, "", f"error: {sentence}\n")
