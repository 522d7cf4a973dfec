"""Documents from files, what is refused or skipped, and what is held out."""

import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig, UserError
from moe_jax.data import formats
from moe_jax.data.corpus import Span, split_holdout
from moe_jax.data.files import Files
from moe_jax.data.sources import open_corpus

SKIP = "; mend it, or set config.data.skip_invalid=True to skip and count such"


def _open(pattern: Path | str, **fields: Any) -> Files:
    (corpus,) = open_corpus(DataConfig(source=str(pattern), **fields)).parts
    assert isinstance(corpus, Files)
    return corpus


def _texts(corpus: Files) -> list[bytes]:
    return [_text(corpus, i) for i in range(len(corpus.lengths))]


def _text(corpus: Files, i: int) -> bytes:
    return b"".join(piece.text for piece in corpus.document(i))


def _write(folder: Path, **files: bytes) -> Path:
    """`a_txt=b"..."` writes a.txt."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


def test_the_standard_library_is_the_same_large_corpus_each_time() -> None:
    corpus, again = _open("stdlib"), _open("stdlib")
    assert corpus.lengths.sum() > 5_000_000
    assert (corpus.fingerprint, corpus.skipped) == (again.fingerprint, again.skipped)
    assert corpus.skipped.keys() <= {"empty file"}
    names = [corpus.name(i) for i in range(len(corpus.lengths))]
    assert names == sorted(set(names))
    for name in names:
        parts = set(Path(name).parts)
        assert not parts & {"test", "tests", "site-packages", "__pycache__"} and name[0] != "/"
    i = names.index("json/decoder.py")
    root = Path(sysconfig.get_path("stdlib"))
    assert _text(corpus, i) == (root / "json/decoder.py").read_bytes()
    assert corpus.lengths[i] == len(_text(corpus, i))


def test_text_files_are_taken_byte_for_byte(tmp_path: Path) -> None:
    contents = [b"\xef\xbb\xbfone\r\ntwo\r\n", b"\n", "d\u00e9j\u00e0".encode()]
    _write(tmp_path, a_txt=contents[0], b_md=contents[1], c_JSON=contents[2])
    (tmp_path / "d.txt").mkdir()
    corpus = _open(tmp_path / "*")
    assert _texts(corpus) == contents
    assert corpus.lengths.dtype == np.int64 and corpus.lengths.tolist() == list(map(len, contents))
    assert [corpus.name(i) for i in range(3)] == [
        str(tmp_path / name) for name in ("a.txt", "b.md", "c.JSON")
    ]


def test_globs_may_be_recursive_and_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, b_txt=b"b")
    _write(tmp_path / "a", c_txt=b"c")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _texts(_open("~/**/*.txt")) == [b"c", b"b"]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n  \n"])
def test_jsonl_is_a_document_a_line(tmp_path: Path, end: bytes) -> None:
    lines = [b'{"text": "one\\r\\n\\u00e9", "id": 1}', b"", b"  \t", '{"text": "é"}'.encode()]
    _write(tmp_path, a_jsonl=b"\r\n".join(lines) + end, b_txt=b"plain")
    corpus = _open(tmp_path / "*")
    assert _texts(corpus) == ["one\r\n\u00e9".encode(), "é".encode(), b"plain"]
    assert [corpus.name(i).removeprefix(f"{tmp_path}/") for i in range(3)] == [
        "a.jsonl:1",
        "a.jsonl:4",
        "b.txt",
    ]


def test_text_field_and_a_byte_order_mark_before_json(tmp_path: Path) -> None:
    _write(tmp_path, a_jsonl=b'\xef\xbb\xbf{"body": "x", "text": "y"}\n{"body": "z"}')
    assert _texts(_open(tmp_path / "a.jsonl", text_field="body")) == [b"x", b"z"]


# A file, the sentence about it after its path, and the reason that is counted.
BAD: dict[str, tuple[str, bytes, str, str]] = {
    "empty": ("x.txt", b"", " is empty", "empty file"),
    "empty JSONL": ("x.jsonl", b"\n \n", " is empty", "empty file"),
    "not UTF-8": (
        "x.txt",
        b"one\ntwo \xff\n",
        ":2 is not UTF-8 text: byte 0xff at offset 8 of the file",
        "invalid UTF-8",
    ),
    "JSONL not UTF-8": (
        "x.jsonl",
        b'{"text": "fine"}\n{"text": "\xff"}\n',
        ":2 is not UTF-8 text: invalid start byte",
        "invalid UTF-8",
    ),
    "half a surrogate pair": (
        "x.jsonl",
        b'{"text": "\\ud800"}',
        ":1 has half a surrogate pair in field 'text'",
        "invalid UTF-8",
    ),
    "no JSON": (
        "x.jsonl",
        b'{"text": "a"}\n\n{"text": "b"\n',
        ":3 is not JSON: Expecting ',' delimiter at column 13",
        "record that does not parse",
    ),
    "a list": (
        "x.jsonl",
        b'["text"]\n',
        ":1 is a JSON list, not an object",
        "record without text",
    ),
    "no such field": (
        "x.jsonl",
        b'{"url": "u", "body": "b"}',
        ":1 has no field 'text' (config.data.text_field); it has body, url",
        "record without text",
    ),
    "no fields": (
        "x.jsonl",
        b"{}",
        ":1 has no field 'text' (config.data.text_field); it has no fields",
        "record without text",
    ),
    "an empty text": (
        "x.jsonl",
        b'{"text": ""}',
        ":1 has no text in field 'text' (config.data.text_field); it has text",
        "record without text",
    ),
    "text that is no string": (
        "x.jsonl",
        b'{"text": 5}',
        ":1 has no text in field 'text' (config.data.text_field); it has text",
        "record without text",
    ),
}


@pytest.mark.parametrize(("name", "content", "sentence", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_named_or_counted(
    tmp_path: Path, name: str, content: bytes, sentence: str, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "y.txt").write_bytes(b"good")
    with pytest.raises(UserError) as error:
        _open(tmp_path / "*")
    assert str(error.value) == f"{tmp_path / name}{sentence}{SKIP}"
    corpus = _open(tmp_path / "*", skip_invalid=True)
    assert corpus.skipped == {reason: 1}
    assert _texts(corpus)[-1] == b"good"


@pytest.mark.parametrize(
    "line", [b'{"text": ' + b"9" * 5000 + b"}", b"[" * 200_000], ids=["digits", "nesting"]
)
def test_json_beyond_the_parsers_limits_does_not_parse(tmp_path: Path, line: bytes) -> None:
    _write(tmp_path, a_jsonl=line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1 is not "):
        _open(tmp_path / "*")
    corpus = _open(tmp_path / "*", skip_invalid=True)
    assert _texts(corpus) == [b"b"]
    assert corpus.skipped == {"record that does not parse": 1}


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, a_txt=b"a", b_txt=b"b")

    def opened(path: Path, mode: str) -> Any:  # permissions do not bind root
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return open(path, mode)

    monkeypatch.setattr(formats, "open", opened, raising=False)
    with pytest.raises(UserError) as error:
        _open(tmp_path / "*")
    assert str(error.value) == f"cannot read {tmp_path / 'a.txt'}: Permission denied{SKIP}"
    corpus = _open(tmp_path / "*", skip_invalid=True)
    assert (_texts(corpus), corpus.skipped) == ([b"b"], {"unreadable file": 1})


def test_no_match_and_nothing_usable_left(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        _open("/no/such/*.txt")
    assert str(error.value) == (
        "config.data.source='/no/such/*.txt' matches no file; give 'stdlib', a glob of files or a "
        "folder"
    )
    _write(tmp_path, a_txt=b"", b_txt=b"\xff", c_txt=b"")
    with pytest.raises(UserError) as error:
        _open(tmp_path / "*", skip_invalid=True)
    assert str(error.value) == (
        f"config.data.source='{tmp_path}/*' has no usable document: 2 empty file, 1 invalid UTF-8"
    )


def test_the_fingerprint_is_of_contents_in_order_and_not_of_places(tmp_path: Path) -> None:
    def fingerprint(folder: str, pattern: str = "*", **files: bytes) -> str:
        return _open(_write(tmp_path / folder, **files) / pattern).fingerprint

    first = fingerprint("one", a_txt=b"ab", b_txt=b"c")
    assert first == fingerprint("two", c_md=b"ab", d_md=b"c")
    assert first == fingerprint("three", a_jsonl=b'{"text": "ab", "id": 1}\n{"text": "c"}')
    others = [
        fingerprint("four", a_txt=b"a", b_txt=b"bc"),
        fingerprint("five", a_txt=b"c", b_txt=b"ab"),
        fingerprint("six", a_txt=b"ab"),
        fingerprint("seven", a_txt=b"ab", b_txt=b"d"),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.txt", b"one text", b"two text"),
        ("a.txt", b"one text", b"one"),
        ("a.txt", b"one text", None),
        ("a.jsonl", b'{"text": "one"}\n', b'{"text": "two"}\n'),
        ("a.jsonl", b'{"text": "one"}\n', b'{"text": "on'),
        ("a.jsonl", b'{"text": "one"}\n', b'\n\n{"text": "one"}'),
    ],
)
def test_a_file_that_changes_while_in_use_is_noticed(
    tmp_path: Path, name: str, before: bytes, after: bytes | None
) -> None:
    file = tmp_path / name
    file.write_bytes(before)
    corpus = _open(file)
    assert b"one" in _text(corpus, 0)
    if after is None:
        os.remove(file)
    else:
        file.write_bytes(after)
    with pytest.raises(UserError) as error:
        corpus.tokens(0)
    assert str(error.value) == (
        f"{corpus.name(0)} changed while it was in use; start the run again"
    )


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(2, 50))
def test_training_and_held_out_spans_are_every_prediction_once(
    lengths: list[int], every: int
) -> None:
    corpus: Any = Sized(lengths)
    (training,), held_out = split_holdout([corpus], every)
    predictions = [
        (span.document, p) for span in [*training, *held_out] for p in range(span.start, span.stop)
    ]
    assert len(predictions) == len(set(predictions))
    assert set(predictions) == {(i, p) for i, n in enumerate(lengths) for p in range(n + 1)}
    assert all(span.start < span.stop for span in [*training, *held_out])
    if len(lengths) >= every:
        assert [span.document + 1 for span in held_out] == list(
            range(every, len(lengths) + 1, every)
        )
        assert all(span.start == 0 for span in held_out)
    else:  # a share of each document's end
        for span, length in zip(held_out, lengths, strict=True):
            assert span == (span.document, span.start, length + 1)
            assert span.stop - span.start == max(1, (length + 1) // every)


def test_nothing_is_held_out_for_0() -> None:
    corpus: Any = Sized([3, 1])
    assert split_holdout([corpus], 0) == ([[Span(0, 0, 4), Span(1, 0, 2)]], [])


@pytest.mark.parametrize("every", [0, 32])
def test_one_big_document_is_shared_out_in_many_spans(every: int) -> None:
    corpus: Any = Sized([1_100_000])
    (training,), held_out = split_holdout([corpus], every)
    assert len(training) == 64
    assert training[0].start == 0
    assert all(a.stop == b.start for a, b in zip(training, training[1:], strict=False))
    assert training[-1].stop == (held_out[0].start if every else 1_100_001)


class Sized:
    """As much of a corpus as is needed to split it."""

    def __init__(self, lengths: list[int]):
        self.lengths = np.array(lengths, np.int64)


def test_a_jsonl_file_of_many_lines_is_read_at_random(tmp_path: Path) -> None:
    texts = [f"line {i} " + "é" * (i % 7) for i in range(100)]
    lines = "\n".join(json.dumps({"n": i, "text": text}) for i, text in enumerate(texts))
    _write(tmp_path, a_jsonl=lines.encode())
    corpus = _open(tmp_path / "a.jsonl")
    order = np.random.default_rng(0).permutation(100)
    assert [_text(corpus, int(i)) for i in order] == [texts[i].encode() for i in order]
