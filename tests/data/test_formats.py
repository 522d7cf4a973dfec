"""Every kind of file gives the same documents; damaged ones are one sentence with the place."""

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module  # pyright: ignore

from moe_jax.config import DataConfig, UserError
from moe_jax.data import files, formats
from moe_jax.data.files import Files
from moe_jax.data.sources import Mixture, open_corpus
from moe_jax.data.token_folder import TokenFolder

TEXTS = ["one", "two\nlines", "déjà vu", "x" * 3000, *(f"number {i}" for i in range(3000))]
SKIP = "; mend it, or set config.data.skip_invalid=True to skip and count such"


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def _zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def _table(texts: list[str]) -> pa.Table:
    return pa.table({"id": range(len(texts)), "text": texts})


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_bytes(_jsonl(texts))


def write_gzip(path: Path, texts: list[str]) -> None:
    path.write_bytes(gzip.compress(_jsonl(texts)))


def write_zstd(path: Path, texts: list[str]) -> None:
    """In two frames, as parallel compressors write it."""
    half = len(texts) // 2
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(_jsonl(texts[:half]))
    with open(path, "ab") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(_jsonl(texts[half:]))


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(_table(texts), path, row_group_size=500, write_page_checksum=True)


def write_arrow(path: Path, texts: list[str]) -> None:
    table = _table(texts)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def write_array_record(path: Path, texts: list[str]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for line in _jsonl(texts).splitlines():
        writer.write(line)
    writer.close()


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "a.array_record": write_array_record,
}
AT_RANDOM = {"a.jsonl", "a.arrow", "a.array_record"}


def _open(folder: Path, pattern: str = "*", **fields: Any) -> Mixture:
    cache = str(folder.parent / f"{folder.name}_cache")
    return open_corpus(DataConfig(source=str(folder / pattern), cache=cache, **fields))


def _texts(corpus: Mixture) -> list[str]:
    order = np.random.default_rng(0).permutation(len(corpus.lengths))
    found = {int(i): corpus.tokens(int(i))[0] for i in order}
    assert all(len(ids) == corpus.lengths[i] + 2 for i, ids in found.items())
    return [bytes(found[i][1:-1].astype(np.uint8)).decode() for i in sorted(found)]


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_documents_whatever_they_lie_in(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[name](folder / name, TEXTS)
    corpus = _open(folder)
    assert _texts(corpus) == TEXTS
    (part,) = corpus.parts
    if name in AT_RANDOM:
        assert isinstance(part, Files) and corpus.name(2) == f"{folder / name}:3"
    else:
        assert isinstance(part, TokenFolder)
        assert corpus.fingerprint == _open(folder).fingerprint


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_a_compressed_text_is_one_document(tmp_path: Path, end: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if end == ".gz":
        (folder / "a.txt.gz").write_bytes(gzip.compress(b"some text"))
    else:
        with pa.CompressedOutputStream(str(folder / "a.txt.zst"), "zstd") as stream:
            stream.write(b"some text")
    assert _texts(_open(folder)) == ["some text"]


def test_files_of_several_kinds_are_one_corpus_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i, (name, write) in enumerate(WRITERS.items()):
        write(folder / f"{i}{name}", [f"text {i}"])
    assert _texts(_open(folder)) == [f"text {i}" for i in range(len(WRITERS))]


def test_a_folder_of_a_hugging_face_data_set(tmp_path: Path) -> None:
    split = tmp_path / "set" / "train"
    split.mkdir(parents=True)
    shards = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for i, shard in enumerate(shards):
        write_arrow(split / shard, [f"shard {i}", "end"])
    state = {"_data_files": [{"filename": shard} for shard in shards]}
    (split / "state.json").write_text(json.dumps(state))
    (split / "dataset_info.json").write_text("{}")
    assert _texts(_open(split, "")) == ["shard 0", "end", "shard 1", "end"]
    (split.parent / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        UserError, match=r"has the splits train, test; name one, as in .*/set/train"
    ):
        _open(split.parent, "")
    # As it is downloaded: files of records, wherever they lie, and a card that is none.
    down = tmp_path / "down"
    (down / "data").mkdir(parents=True)
    (down / "README.md").write_text("a card")
    write_parquet(down / "data" / "train.parquet", ["row"])
    assert _texts(_open(down, "")) == ["row"]


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) * 2 // 5  # in texts, whatever the file
    content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    path.write_bytes(content)


def _nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in WRITERS
        for damage in (_cut, _flip, _nothing)
        # Arrow files have no checksums, nor has JSONL.
        if name != "a.jsonl" and (name, damage) != ("a.arrow", _flip)
    ],
)
def test_damaged_files_are_named_or_counted(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    texts = [rng.bytes(60).hex() for _ in range(3000)]
    WRITERS[name](folder / name, texts)
    damage(folder / name)
    write_jsonl(folder / "b.jsonl", ["good"])
    with pytest.raises(UserError) as error:
        _open(folder)
    sentence = str(error.value)
    assert sentence.startswith(str(folder / name)) and sentence.endswith(SKIP)
    assert "\n" not in sentence
    corpus = _open(folder, skip_invalid=True)
    assert sum(corpus.skipped.values()) >= 1
    found = _texts(corpus)
    assert found[-1] == "good"
    # A compressed file's only checksum stands at the end, if there is one.
    if damage != _flip or name not in ("a.jsonl.gz", "a.jsonl.zst"):
        assert corpus.skipped.keys() <= {
            "unreadable file",
            "empty file",
            "record that does not parse",
        }
        assert found[:-1] == texts[: len(found) - 1], "what lies before the damage"


def test_fields_that_are_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "a.parquet", ["x"])
    with pytest.raises(UserError, match=r"a\.parquet has no column 'body'; it has id, text; mend"):
        _open(folder, text_field="body")
    pq.write_table(pa.table({"text": ["a", None, "", "b"]}), folder / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet:2 has no text in field 'text'"):
        _open(folder)
    corpus = _open(folder, skip_invalid=True)
    assert (_texts(corpus), corpus.skipped) == (["a", "b"], {"record without text": 2})
    (folder / "b.txt").write_text("text")
    with pytest.raises(UserError, match=r"b\.txt is text, and config\.data\.records='chats' wants"):
        _open(folder, "b.txt", records="chats")


def test_chats_in_columns(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pq.write_table(pa.table({"messages": [messages]}), folder / "a.parquet")
    fields: dict[str, Any] = {"records": "chats", "message_format": "{content}"}
    ids, weights = _open(folder, **fields).tokens(0)
    assert ids.tolist() == [256, ord("a"), ord("b"), 256] and weights.tolist()[1:] == [0, 1, 1]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[name](tmp_path / name, ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError) as error:
        list(files.scan(files.list_files(str(tmp_path / name)), DataConfig(), Counter()))
    assert str(error.value) == (
        f"{tmp_path / name} needs the package pyarrow, which is not installed; "
        'run pip install "moe_jax[data]"'
    )


@pytest.mark.parametrize("name", ["a.arrow", "a.array_record"])
def test_a_file_that_changes_while_in_use_is_noticed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[name](folder / name, ["one", "two"])
    corpus = _open(folder)
    (folder / name).unlink()
    formats._arrow_table.cache_clear()
    formats._array_record.cache_clear()
    with pytest.raises(UserError, match=r":2 changed while it was in use; start the run again"):
        corpus.tokens(1)


@pytest.mark.slow
def test_a_document_of_100_megabytes(tmp_path: Path) -> None:
    line = b"A line of sixty-four bytes, the last of which is its line end.\n"
    (tmp_path / "big.txt").write_bytes(line * (100_000_000 // len(line)))
    corpus = open_corpus(DataConfig(source=str(tmp_path / "big.txt")))
    ids, weights = corpus.tokens(0)
    assert len(ids) == len(weights) == corpus.lengths[0] + 2 > 99_000_000
