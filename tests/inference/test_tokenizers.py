"""Which tokenizer a checkpoint has, and a tokenizer.json with the files beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from moe_jax.config import UserError
from moe_jax.data.tokenizer import BOUNDARY, ByteTokenizer, IdTokenizer, open_tokenizer

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "to": 3, "be": 4, "or": 5}


def _write(folder: Path, **files: Any) -> Path:
    model = tokenizers.models.WordLevel(WORDS, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_without_a_file_a_small_vocabulary_is_of_bytes(tmp_path: Path) -> None:
    assert isinstance(open_tokenizer(tmp_path, 264), ByteTokenizer)
    assert isinstance(open_tokenizer(tmp_path / "missing", 257), ByteTokenizer)
    for size in (256, 32_000):
        tokenizer = open_tokenizer(tmp_path, size)
        assert isinstance(tokenizer, IdTokenizer)
        with pytest.raises(UserError, match="no tokenizer"):
            tokenizer.prompt("text")


def test_a_prompt_of_bytes_begins_as_documents_do() -> None:
    assert ByteTokenizer().prompt("ab").tolist() == [BOUNDARY, 97, 98]


def test_a_file_alone(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(_write(tmp_path), 264)
    assert tokenizer.prompt("to be").tolist() == [3, 4]
    assert tokenizer.decode([1, 3, 5, 4, 2]) == "to or be"
    assert tokenizer.end_ids == frozenset()


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}], ids=str)
def test_the_files_beside_it_say_where_texts_begin_and_end(tmp_path: Path, token: Any) -> None:
    config = {"bos_token": "<s>", "add_bos_token": True, "eos_token": token}
    tokenizer = open_tokenizer(_write(tmp_path, tokenizer_config=config), 264)
    assert tokenizer.prompt("to be").tolist() == [1, 3, 4]
    assert tokenizer.prompt("<s> to be").tolist() == [1, 3, 4]
    assert tokenizer.end_ids == {2}
    _write(tmp_path, generation_config={"eos_token_id": [4, 5]})
    assert open_tokenizer(tmp_path, 264).end_ids == {4, 5}


def test_broken_files(tmp_path: Path) -> None:
    (_write(tmp_path) / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is no JSON"):
        open_tokenizer(tmp_path, 264)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer"):
        open_tokenizer(tmp_path, 264)
