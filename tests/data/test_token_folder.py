"""Folders of tokens: what is written comes back, a break is gone on from, damage is noticed."""

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig, UserError
from moe_jax.data import token_folder
from moe_jax.data.documents import Document, Piece
from moe_jax.data.sources import open_corpus
from moe_jax.data.token_folder import TokenFolder, write_token_folder
from moe_jax.data.tokenizer import ByteTokenizer, encode_documents

TOKENIZER = ByteTokenizer()


def _write(folder: Path, documents: list[Document], **changes: Any) -> None:
    def all_of_them(skipped: collections.Counter[str]) -> Iterator[Document]:
        skipped["empty file"] += 2
        yield from documents

    arguments: dict[str, Any] = dict(weighted=True, shard_tokens=20, about={"files": ["a"]})
    write_token_folder(folder, all_of_them, TOKENIZER, **arguments | changes)


PIECES = st.builds(Piece, st.binary(min_size=1, max_size=12), st.sampled_from([0.0, 1.0]))
DOCUMENTS = st.lists(st.lists(PIECES, min_size=1, max_size=3).map(tuple), max_size=12)


@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(DOCUMENTS, st.integers(1, 60))
def test_documents_come_back_from_their_shards(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens") / "a"
    _write(folder, documents, shard_tokens=shard_tokens)
    corpus = TokenFolder(folder)
    assert corpus.skipped == {"empty file": 2}
    expected = encode_documents(documents, TOKENIZER)
    assert corpus.lengths.tolist() == [len(ids) - 2 for ids, _ in expected]
    for i, (ids, weights) in enumerate(expected):
        found, found_weights = corpus.tokens(i)
        np.testing.assert_array_equal(found, ids)
        np.testing.assert_array_equal(found_weights[1:], weights[1:])
        assert (found.dtype, found_weights.dtype) == (np.int32, np.float32)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokens"] == corpus.lengths.sum()
    assert all(shard["tokens"] >= shard_tokens for shard in manifest["shards"][:-1])


def _plain(count: int) -> list[Document]:
    return [(Piece(b"document %d" % i),) for i in range(count)]


@pytest.mark.parametrize("stop", [1, 3, 7, 10])
def test_writing_goes_on_from_the_last_whole_shard(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_folder, "BATCH_BYTES", 1)
    documents = _plain(10)
    _write(tmp_path / "whole", documents, weighted=False)

    class Broken(Exception):
        pass

    def until(skipped: collections.Counter[str]) -> Iterator[Document]:
        yield from documents[:stop]
        raise Broken

    arguments: dict[str, Any] = dict(weighted=False, shard_tokens=20, about={"files": ["a"]})
    with pytest.raises(Broken):
        write_token_folder(tmp_path / "part", until, TOKENIZER, **arguments)
    if (tmp_path / "part" / "manifest.json").exists():
        with pytest.raises(UserError, match=r"part is not whole: \d shards? were written; run"):
            TokenFolder(tmp_path / "part")
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("part/*.npy")}
    _write(tmp_path / "part", documents, weighted=False)
    for name, time in before.items():
        assert (tmp_path / "part" / name).stat().st_mtime_ns == time, "written once"
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "part").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    _write(tmp_path / "a", _plain(3))
    with pytest.raises(UserError, match="holds tokens of something else: about is"):
        _write(tmp_path / "a", _plain(3), about={"files": ["b"]})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="b exists and holds no tokens; give another or remove it"):
        _write(tmp_path / "b", _plain(3))


def test_damage_is_noticed(tmp_path: Path) -> None:
    _write(tmp_path / "a", _plain(3))
    first = tmp_path / "a" / "00000.ids.npy"
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"00000\.ids\.npy cannot be read: .*; tokenize again"):
        TokenFolder(tmp_path / "a")
    np.save(first, np.zeros(7, np.uint8))
    with pytest.raises(UserError, match="has 7 items and the manifest says"):
        TokenFolder(tmp_path / "a")
    first.unlink()
    with pytest.raises(UserError, match=r"00000\.ids\.npy cannot be read"):
        TokenFolder(tmp_path / "a")


def test_a_source_that_is_a_folder_of_tokens(tmp_path: Path) -> None:
    _write(tmp_path / "a", _plain(3))
    corpus = open_corpus(DataConfig(source=str(tmp_path / "a")))
    assert isinstance(corpus.parts[0], TokenFolder)
    assert corpus.name(1) == f"{tmp_path / 'a'}:2"
    _write(tmp_path / "none", [])
    with pytest.raises(UserError, match="has no usable document: 2 empty file"):
        open_corpus(DataConfig(source=str(tmp_path / "none")))


def test_fingerprints_are_of_contents(tmp_path: Path) -> None:
    for name, documents in (("a", _plain(3)), ("b", _plain(3)), ("c", _plain(4))):
        _write(tmp_path / name, documents, about={"files": [name]})
    a, b, c = (TokenFolder(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c
