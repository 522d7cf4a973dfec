"""Documents whose middle comes last hold the same text, and the same each time."""

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig, UserError
from moe_jax.data.corpus import split_holdout
from moe_jax.data.fill_in_middle import FillInMiddle
from moe_jax.data.packing import pack_once
from moe_jax.data.sources import open_corpus

PREFIX, SUFFIX, MIDDLE, BOUNDARY = 997, 998, 999, 0


class _Numbered:
    """Document i has the ids 1, 2, ... to its length."""

    def __init__(self, lengths: list[int], name: str = "a"):
        self.lengths = np.array(lengths, np.int64)
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()
        self.skipped: Any = {}
        self.name = str

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([BOUNDARY, *range(1, self.lengths[i] + 1), BOUNDARY], np.int32)
        return ids, np.ones(len(ids), np.float32)


def _corpus(lengths: list[int], rate: float, spm_rate: float, name: str = "a") -> FillInMiddle:
    return FillInMiddle(_Numbered(lengths, name), (PREFIX, SUFFIX, MIDDLE), rate, spm_rate)


def _put_back(ids: list[int]) -> tuple[str, list[int]]:
    """The form, and the document as it was."""
    assert ids[0] == ids[-1] == BOUNDARY
    text = ids[1:-1]
    if PREFIX not in text:
        return "plain", text
    assert text[0] == PREFIX and text.count(SUFFIX) == text.count(MIDDLE) == 1
    suffix, middle = text.index(SUFFIX), text.index(MIDDLE)
    if suffix == 1 and (after := text[suffix + 1 : middle]) and text[middle + 1 :][:1] == [1]:
        return "spm", text[middle + 1 :] + after
    return "psm", text[1:suffix] + text[middle + 1 :] + text[suffix + 1 : middle]


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_token_is_there_once_and_the_text_can_be_put_back(
    lengths: list[int], rate: float, spm_rate: float
) -> None:
    corpus, again = _corpus(lengths, rate, spm_rate), _corpus(lengths, rate, spm_rate)
    forms = set()
    for i, length in enumerate(lengths):
        ids, weights = corpus.tokens(i)
        assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
        assert len(ids) == len(weights) == corpus.lengths[i] + 2
        np.testing.assert_array_equal(ids, again.tokens(i)[0])
        form, text = _put_back(ids.tolist())
        forms.add(form)
        assert text == list(range(1, length + 1))
    allowed = {0.0: {"plain"}, 0.5: {"plain", "psm", "spm"}, 1.0: {"psm", "spm"}}[rate]
    assert forms <= allowed
    if not spm_rate:
        assert "spm" not in forms


def _documents(length: int, name: str = "a") -> list[tuple[str, list[int]]]:
    corpus = _corpus([length] * 2000, 0.5, 0.25, name)
    documents = [corpus.tokens(i)[0].tolist() for i in range(2000)]
    return [(_put_back(ids)[0], ids) for ids in documents]


def test_rates_are_kept_and_cuts_are_anywhere() -> None:
    # Of an empty prefix or suffix both forms are the same, which is rare in long documents.
    forms = [form for form, _ in _documents(200)]
    assert 0.46 < 1 - forms.count("plain") / 2000 < 0.54
    assert 0.21 < forms.count("spm") / (2000 - forms.count("plain")) < 0.29
    cuts = {ids.index(SUFFIX) for form, ids in _documents(5) if form == "psm"}
    assert cuts == set(range(2, 8)), "none of the tokens, all of them, or any number between"
    assert _documents(5) == _documents(5) != _documents(5, "b")


def test_bytes_have_ids_for_it_and_packing_brings_every_prediction(tmp_path: Any) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "document {i}"}}' for i in range(50)))
    plain = open_corpus(DataConfig(source=str(tmp_path / "*")))
    corpus = open_corpus(DataConfig(source=str(tmp_path / "*"), fim_rate=0.5))
    assert plain.lengths.sum() < corpus.lengths.sum() <= plain.lengths.sum() + 150
    assert corpus.fingerprint == plain.fingerprint and corpus.name(3) == plain.name(3)
    (spans,), _ = split_holdout(corpus.parts, 0)
    rows = list(
        pack_once(corpus, spans, length=40, packing="best_fit", bins=4, mask_documents=True)
    )
    assert sum(row["loss_weights"].sum() for row in rows) == corpus.lengths.sum() + 50
    tokens = np.concatenate([row["tokens"] for row in rows])
    counts = [(tokens == token).sum() for token in (257, 258, 259)]
    assert counts[0] == counts[1] == counts[2] == (corpus.lengths - plain.lengths).sum() / 3


def test_a_tokenizer_without_the_tokens(tmp_path: Any) -> None:
    import tokenizers

    model = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "own.json"))
    (tmp_path / "a.txt").write_text("text")
    fields: dict[str, Any] = {"cache": str(tmp_path / "cache"), "fim_rate": 0.5}
    with pytest.raises(UserError, match=r"fim_rate=0.5 needs tokens .*own\.json.* has none"):
        open_corpus(
            DataConfig(
                source=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "own.json"), **fields
            )
        )
