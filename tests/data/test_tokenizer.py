"""Bytes as tokens."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.tokenizer import BOUNDARY, ByteTokenizer

TOKENIZER = ByteTokenizer()


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.text())
def test_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32 and len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text
    document = TOKENIZER.encode_document(text.encode())
    assert document.dtype == np.int32
    assert document.tolist() == [BOUNDARY, *ids.tolist(), BOUNDARY]
    assert TOKENIZER.decode(document) == text


def test_every_id_fits_the_vocabulary_and_what_is_no_text_is_shown_or_left_out() -> None:
    assert max(TOKENIZER.encode_document(bytes(range(256)))) + 1 == TOKENIZER.vocab_size
    # A model's vocabulary may be larger than the tokenizer's.
    assert TOKENIZER.decode([ord("a"), 263, BOUNDARY, 0xFF, ord("b"), 0xC3, 0xA9]) == "a\ufffdbé"
