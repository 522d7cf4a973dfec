"""The command that trains tokenizers and makes folders of tokens."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from data_command import run

from moe_jax.config import DataConfig
from moe_jax.data.sources import open_corpus
from moe_jax.data.tokenizer import load_tokenizer

_run = functools.partial(run, "tokenize")


def test_a_tokenizer_is_trained_and_a_folder_made_that_trains(tmp_path: Path) -> None:
    texts = [f"The {i}th of many sheep.\nIt jumps over the fence. " * 9 for i in range(40)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"body": ""}']))
    arguments = ["--source=a.jsonl", "--target=tokens", "--tokenizer=own.json", "--vocab_size=300"]
    assert _run(tmp_path, *arguments).stderr.startswith("error: a.jsonl:41 has no field 'text'")

    done = _run(tmp_path, *arguments, "--skip_invalid", "--shard_tokens=2000")
    assert done.returncode == 0, done.stderr
    trained, tokenizer, written = done.stdout.splitlines()
    assert trained.startswith("trained     own.json: on ")
    assert tokenizer == "tokenizer   own.json: 300 ids"
    assert written.startswith("written     tokens: 40 documents, ") and "uint16" in written
    assert written.endswith("(skipped: 1 record without text)")

    config = DataConfig(source=str(tmp_path / "tokens"))
    corpus = open_corpus(config)
    saved = corpus.tokenizer
    assert [saved.decode(corpus.tokens(i)[0]) for i in range(40)] == texts
    own = load_tokenizer(str(tmp_path / "own.json"))
    np.testing.assert_array_equal(
        corpus.tokens(3)[0][1:-1], own.encode([texts[3].encode()])[0], "what is saved is the same"
    )
    # All that a tokenizer of ours has besides bytes.
    assert own.boundary == 0 and own.fill == (1, 2, 3)
    assert own.encode(["\x00ÿ日".encode()])[0].max() < 300


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--source=a"], "give --source and --target"),
        (["--source=a", "--target=b"], "--source='a' matches no file"),
        (
            ["--source=*.txt", "--target=b", "--tokenizer=no.json"],
            "the tokenizer 'no.json' is not there",
        ),
        (
            ["--source=*.txt", "--target=b", "--tokenizer=no.json", "--vocab_size=9"],
            "--vocab_size=9 must be at least 262: bytes and special tokens",
        ),
        (
            ["--source=*.txt", "--target=b", "--tokenizer=no/no.json", "--vocab_size=999"],
            "no/no.json cannot be written; name a .json file in a folder that is there",
        ),
        (["--source=*.txt", "--target=b", "--shard_tokens=0"], "--shard_tokens=0 must be at least"),
        (
            ["--source=*.txt", "--target=b", "--message_format=x"],
            "config.data.message_format='x' must have {content} once",
        ),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    done = _run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sentence}")
