"""Documents as ids: of bytes, of a tokenizer.json, of a SentencePiece model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import UserError
from moe_jax.data import tokenizer as module
from moe_jax.data.documents import Piece
from moe_jax.data.tokenizer import (
    BOUNDARY,
    ByteTokenizer,
    FileTokenizer,
    SentencePieceTokenizer,
    TrainingTokenizer,
    encode_documents,
    load_tokenizer,
    open_tokenizer,
)

TEXT = "It was the best of times, it was the worst of times.\nIt was the age of wisdom.\n" * 20
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def _bpe(file: Path, *special: str) -> Path:
    """A byte-level tokenizer.json of some merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(TEXT)
    script = (
        "import sentencepiece; sentencepiece.SentencePieceTrainer.train(input='text.txt', "
        "model_prefix='sp', vocab_size=300, byte_fallback=True, hard_vocab_limit=False, "
        "normalization_rule_name='identity', remove_extra_whitespaces=False, minloglevel=2)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True)
    bpe = _bpe(folder / "tokenizer.json", "<|endoftext|>", *module.FILL_IN_MIDDLE[0])
    return {"bpe": bpe, "sentencepiece": folder / "sp.model"}


@pytest.fixture(params=["bytes", "bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, files: dict[str, Path]) -> TrainingTokenizer:
    return load_tokenizer(str(files.get(request.param, "bytes")))


@repeatable
@given(text=st.text(st.characters(codec="utf-8")))
def test_text_comes_back(text: str) -> None:
    ids = ByteTokenizer().encode([text.encode()])[0]
    assert ids.dtype == np.int32 and len(ids) == len(text.encode())
    assert ByteTokenizer().decode(ids) == text


def test_texts_come_back_whoever_cuts_them_into_tokens(tokenizer: TrainingTokenizer) -> None:
    texts = ["It was", " two  spaces", "déjà\n\nvu", "日本 \U0001f600", "<|endoftext|>", "\tx\r\n"]
    encoded = tokenizer.encode([text.encode() for text in texts])
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    for ids in encoded:
        assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size
        # The text of a special token is text.
        assert tokenizer.boundary not in ids
    assert tokenizer.boundary < tokenizer.vocab_size


def test_documents_are_ids_between_boundaries_with_a_weight_each(
    tokenizer: TrainingTokenizer,
) -> None:
    chat = (Piece(b"It was?", 0.0), Piece(b"the best of"), Piece(b"times", 0.0))
    plain = (Piece(b"the age"),)
    (ids, weights), (plain_ids, plain_weights) = encode_documents([chat, plain], tokenizer)
    lengths = [len(ids) for ids in tokenizer.encode([piece.text for piece in chat])]
    assert ids[0] == ids[-1] == plain_ids[0] == plain_ids[-1] == tokenizer.boundary
    expected = np.repeat([0.0, 0.0, 1.0, 0.0, 0.0], [1, *lengths, 1])
    np.testing.assert_array_equal(weights, expected)
    np.testing.assert_array_equal(plain_weights[1:], 1.0)
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(
        ids[1:-1], np.concatenate(tokenizer.encode([piece.text for piece in chat]))
    )


def test_special_tokens_are_read_in_marks_alone(files: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(files["bpe"]))
    document = (Piece(b"<|endoftext|>", marks=True), Piece(b"<|endoftext|>"))
    ((ids, _),) = encode_documents([document], tokenizer)
    assert ids[1] == tokenizer.boundary
    assert tokenizer.boundary not in ids[2:-1] and len(ids) > 5


def test_a_long_text_is_cut_at_line_ends_into_the_same_ids(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(files["bpe"]))
    (whole,) = tokenizer.encode([TEXT.encode()])
    monkeypatch.setattr(module, "LONGEST", 300)
    assert len(module.cut(TEXT)) > 4
    np.testing.assert_array_equal(tokenizer.encode([TEXT.encode()])[0], whole)
    # Without a line to cut at, it is cut anywhere, and still the same text.
    unbroken = "abcé" * 500
    (ids,) = tokenizer.encode([unbroken.encode()])
    assert tokenizer.decode(ids) == unbroken


def test_ids_of_fill_in_the_middle(files: dict[str, Path]) -> None:
    bpe = load_tokenizer(str(files["bpe"]))
    assert ByteTokenizer().fill == (257, 258, 259)
    assert bpe.fill == (1, 2, 3)
    assert load_tokenizer(str(files["sentencepiece"])).fill is None


def test_the_boundary_is_what_ends_a_text(tmp_path: Path) -> None:
    file = _bpe(tmp_path / "tokenizer.json", "<s>", "</s>", "<pad>")
    assert load_tokenizer(str(file)).boundary == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>"}))
    assert load_tokenizer(str(tmp_path)).boundary == 2
    lonely = tmp_path / "lonely.json"
    _bpe(lonely)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"lonely\.json has no token that ends a text"):
        assert load_tokenizer(str(lonely)).boundary


def test_fingerprints_tell_tokenizers_apart(files: dict[str, Path], tmp_path: Path) -> None:
    prints = [load_tokenizer(name).fingerprint for name in ("bytes", *map(str, files.values()))]
    other = _bpe(tmp_path / "tokenizer.json", "</s>")
    assert len({*prints, load_tokenizer(str(other)).fingerprint}) == 4


def test_what_is_saved_opens_again_and_begins_as_documents_do(
    tokenizer: TrainingTokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    tokenizer.save(folder)
    again: Any = open_tokenizer(folder, 300 if isinstance(tokenizer, ByteTokenizer) else 10_000)
    ((ids, _),) = encode_documents([(Piece(b"It was"),)], tokenizer)
    np.testing.assert_array_equal(again.prompt("It was"), ids[:-1])
    assert again.end_ids == {tokenizer.boundary}
    assert again.decode(ids[1:-1]) == "It was"


def test_what_is_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the tokenizer 'no/such' is not there; give 'bytes'"):
        load_tokenizer("no/such")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"a\.json is no tokenizer: "):
        FileTokenizer(tmp_path / "a.json")
    (tmp_path / "a.model").write_text("hello")
    with pytest.raises(UserError, match=r"a\.model is no SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "a.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        UserError, match=r'sentencepiece, which is not installed; run pip install "moe_jax\[data'
    ):
        SentencePieceTokenizer(tmp_path / "a.model")


def test_every_id_fits_the_vocabulary_and_what_is_no_text_is_shown_or_left_out() -> None:
    tokenizer = ByteTokenizer()
    assert max(*tokenizer.encode([bytes(range(256))])[0], BOUNDARY) + 1 == tokenizer.vocab_size
    # A model's vocabulary may be larger than the tokenizer's.
    assert tokenizer.decode([ord("a"), 263, BOUNDARY, 0xFF, ord("b"), 0xC3, 0xA9]) == "a\ufffdbé"
