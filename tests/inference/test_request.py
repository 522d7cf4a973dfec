"""What a person can ask for wrongly, found before a model is read or compiled."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import MESH_AXES, ModelConfig, MoEConfig, UserError
from moe_jax.data.tokenizer import ByteTokenizer, IdTokenizer
from moe_jax.inference.request import Request, make_mesh, parse_mesh
from moe_jax.inference.sampling import Sampling

BYTES = ByteTokenizer()
MODEL = ModelConfig(max_position_embeddings=64)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "there is no prompt; give --prompt, --prompt_ids or --prompt_file"),
        (
            {"texts": ["a"], "files": ["b"]},
            "--prompt and --prompt_file are given together; give one kind of prompt",
        ),
        ({"texts": ["a"], "max_new_tokens": 0}, "--max_new_tokens=0 must be at least 1"),
        (
            {"texts": ["a"], "cache_length": 1},
            "--cache_length=1 must be at least 2, for a token and the next",
        ),
        (
            {"texts": ["a"], "stops": ["x", ""]},
            "--stop is empty; give the text before which to stop",
        ),
        (
            {"texts": ["a"], "sampling": Sampling(-1.0)},
            "temperature=-1.0 must be at least 0; 0 is greedy",
        ),
        (
            {"texts": ["a"], "sampling": Sampling(0.7), "speculative": True},
            "speculative is greedy; temperature=0.7 must be 0 with it",
        ),
    ],
)
def test_wrong_for_any_model(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Request(**fields).check()
    assert str(error.value) == sentence


def test_prompts_of_each_kind(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("ab\n\n", "utf-8")
    for request, expected in [
        (Request(texts=["ab", "é"]), [[256, 97, 98], [256, 0xC3, 0xA9]]),
        (Request(ids=["1, 2,3", "4"]), [[1, 2, 3], [4]]),
        (Request(files=[str(file)]), [[256, 97, 98, 10]]),  # less one line break
    ]:
        request.check()
        assert [prompt.tolist() for prompt in request.read(BYTES)] == expected


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"texts": ["a", ""]}, "the prompt is empty; give at least one character"),
        (
            {"files": ["{folder}/empty"]},
            "the prompt of {folder}/empty is empty; give at least one character",
        ),
        ({"files": ["{folder}/gone"]}, "--prompt_file={folder}/gone: there is no such file"),
        ({"files": ["{folder}"]}, "--prompt_file={folder}: there is no such file"),
        ({"ids": ["1,x"]}, "--prompt_ids=1,x: 'x' is no token id; give them as 1,2,3"),
        ({"ids": ["1,,2"]}, "--prompt_ids=1,,2: '' is no token id; give them as 1,2,3"),
    ],
)
def test_prompts_that_cannot_be_read(fields: Any, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    fields = {name: [x.format(folder=tmp_path) for x in values] for name, values in fields.items()}
    with pytest.raises(UserError) as error:
        Request(**fields).read(BYTES)
    assert str(error.value) == sentence.format(folder=tmp_path)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"a\xff")
    with pytest.raises(UserError, match="binary is not UTF-8"):
        Request(files=[str(tmp_path / "binary")]).read(BYTES)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(UserError, match="the checkpoint has no tokenizer"):
        Request(texts=["a"]).read(IdTokenizer())
    with pytest.raises(UserError, match="--stop is text, and the checkpoint has no tokenizer"):
        Request(ids=["1"], stops=["a"]).read(IdTokenizer())


def test_the_cache_is_as_long_as_asked_or_needed() -> None:
    prompts = [np.arange(3), np.arange(10)]
    assert Request(max_new_tokens=54).slots(prompts, MODEL) == 64
    assert Request(max_new_tokens=500, cache_length=11).slots(prompts, MODEL) == 11


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"max_new_tokens": 55},
            "a prompt of 10 tokens and --max_new_tokens=55 exceed the 64 positions of the model "
            "(max_position_embeddings); shorten one",
        ),
        (
            {"cache_length": 65},
            "--cache_length=65 exceeds the 64 positions of the model (max_position_embeddings); "
            "shorten it",
        ),
        (
            {"cache_length": 10},
            "the prompt has 10 tokens, and a cache of 10 must hold one more; shorten it or "
            "lengthen the cache",
        ),
        (
            {"max_new_tokens": 1, "speculative": True},
            "speculative needs a model with multi-token prediction, and this one has none",
        ),
    ],
)
def test_wrong_for_this_model(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Request(**fields).slots([np.arange(10)], MODEL)
    assert str(error.value) == sentence


def test_a_mesh_is_what_is_written() -> None:
    ones = dict.fromkeys(MESH_AXES, 1)
    for text, sizes in {
        "": {},
        "expert=4": {"expert": 4},
        "fsdp=2, data=3": {"fsdp": 2, "data": 3},
    }.items():
        mesh = parse_mesh(text)
        assert {axis: getattr(mesh, axis) for axis in MESH_AXES} == ones | sizes
        assert mesh.num_cpu_devices == np.prod([*sizes.values(), 1])
    mesh = make_mesh(parse_mesh("fsdp=2"), MODEL)
    assert mesh.devices.flatten().tolist() == jax.devices()[:2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fdsp=2", "--mesh=fdsp=2: 'fdsp' is none of the axes data, fsdp, expert_outer, expert"),
        (
            "tensor=2",
            "--mesh=tensor=2: 'tensor' is none of the axes data, fsdp, expert_outer, expert",
        ),
        ("fsdp", "--mesh=fsdp: fsdp needs a size of at least 1, as in fsdp=2"),
        ("fsdp=0", "--mesh=fsdp=0: fsdp needs a size of at least 1, as in fsdp=2"),
        ("fsdp=-1", "--mesh=fsdp=-1: fsdp needs a size of at least 1, as in fsdp=2"),
        ("fsdp=16", "--mesh needs 16 devices and there are 8; make it smaller"),
        (
            "expert=3,expert_outer=2",
            "--mesh splits experts over 6 devices, which does not divide the model's 16; "
            "change expert or expert_outer",
        ),
    ],
)
def test_a_mesh_that_cannot_be(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        make_mesh(parse_mesh(text), ModelConfig(moe=MoEConfig(num_experts=16)))
    assert str(error.value) == sentence


def test_redundant_experts_divide_over_the_mesh() -> None:
    config = ModelConfig(moe=MoEConfig(num_experts=16))
    assert make_mesh(parse_mesh("expert_outer=2,expert=2"), config, 8).size == 4
    with pytest.raises(UserError, match="are 22, which do not divide over the 4 devices"):
        make_mesh(parse_mesh("expert_outer=2,expert=2"), config, 6)
