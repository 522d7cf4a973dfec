"""N-grams of a benchmark are found wherever they stand, and nothing else is."""

import gzip
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig, UserError
from moe_jax.data import ngrams as module
from moe_jax.data.files import list_files
from moe_jax.data.ngrams import Item, Ngrams, read_benchmark
from moe_jax.data.sources import open_corpus
from moe_jax.data.token_folder import TokenFolder
from moe_jax.data.tokenization import tokenize
from moe_jax.data.tokenizer import ByteTokenizer

WORDS = st.lists(st.sampled_from(["a", "b", "ab", "é", "日本", "x_1", "7"]), max_size=40)
GLUE = st.sampled_from([" ", "\n", " - ", ", "])


def _plain(text: str, n: int, whole: int) -> list[str]:
    """The n-grams of words, the slow way."""
    words = re.findall(r"\w+", text.lower())
    n = min(n, whole)
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(st.lists(WORDS.filter(bool), min_size=1, max_size=4), WORDS, GLUE, st.integers(1, 6))
def test_what_is_found_is_what_occurs(
    items: list[list[str]], text: list[str], glue: str, n: int
) -> None:
    ngrams = Ngrams([Item(str(i), " ".join(words)) for i, words in enumerate(items)], f"words:{n}")
    found = ngrams.find(glue.join(text).upper())
    for item, numbers in zip(items, ngrams.of_item, strict=True):
        texts = {ngrams.texts[number] for number in numbers}
        assert texts == set(_plain(" ".join(item), n, len(item)))
        occurring = texts & set(_plain(glue.join(text), n, len(item)))
        assert {ngrams.texts[number] for number in numbers if number in found} == occurring


def test_a_long_text_is_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    item = "the quick brown fox jumps over the lazy dog and runs far away"
    ngrams = Ngrams([Item("x", item)], "words:13")
    for padding in range(1, 60):
        text = "y " * padding + item + " z" * 50
        monkeypatch.setattr(module, "PIECE", 40)
        assert ngrams.find(text) == {0}, padding
    assert ngrams.find("y" * 500 + " " + item) == {0}
    assert not ngrams.find(item.replace("fox", "dog"))


def test_characters_see_through_white_space_alone() -> None:
    ngrams = Ngrams([Item("x", "f(x) = x**2 + 1")], "characters:8")
    assert ngrams.find("def F( x )=x ** 2\n+ 1") == set(range(len(ngrams.texts)))
    assert len(ngrams.texts) == len("f(x)=x**2+1") - 8 + 1
    assert not ngrams.find("f(y)=y**2+1")


def test_a_short_item_is_one_n_gram() -> None:
    ngrams = Ngrams([Item("x", "Seven wise women."), Item("y", "one " * 20)], "words:13")
    assert [len(numbers) for numbers in ngrams.of_item] == [1, 1]
    assert ngrams.find("... seven, WISE women ...") == {0}
    assert not ngrams.find("seven women")


def test_what_cannot_be_compared(tmp_path) -> None:
    with pytest.raises(UserError, match=r"n-grams of 'words' are none; give words:13, characters"):
        Ngrams([Item("x", "a")], "words")
    with pytest.raises(UserError, match="x:3 has no words to compare"):
        Ngrams([Item("x:3", "...")], "words:13")
    (tmp_path / "b.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:1 has no field 'answer'; it has question"):
        read_benchmark(list_files(str(tmp_path / "b.jsonl")), "question,answer")


def test_items_are_all_texts_of_a_record_or_those_of_its_fields(tmp_path) -> None:
    (tmp_path / "b.jsonl").write_text('{"q": "one", "n": 3, "choices": ["two", {"c": "three"}]}\n')
    files = list_files(str(tmp_path / "b.jsonl"))
    assert read_benchmark(files, "")[0].text == "one\ntwo\nthree"
    assert read_benchmark(files, "choices,q")[0].text == "two\nthree\none"


def test_contaminated_documents_are_left_out_and_counted(tmp_path) -> None:
    item = "How many apples has Ann if she buys three and eats two of them on the way home?"
    (tmp_path / "bench.jsonl").write_text(f'{{"question": "{item}", "answer": "1"}}\n')
    texts = ["all is well", f"Page 7. {item} Turn over.", "she buys three"]
    lines = "".join(f'{{"text": "{text}"}}\n' for text in texts)
    (tmp_path / "corpus.jsonl").write_text(lines)
    source = str(tmp_path / "corpus.jsonl")
    config = DataConfig(
        source=source, benchmark=str(tmp_path / "bench.jsonl"), cache=str(tmp_path / "cache")
    )
    corpus = open_corpus(config)
    assert corpus.skipped == {"contaminated": 1} and len(corpus.lengths) == 2
    assert corpus.fingerprint != open_corpus(DataConfig(source=source)).fingerprint

    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    cached = DataConfig(
        source=f"{source}.gz", benchmark=config.benchmark, cache=str(tmp_path / "cache")
    )
    assert open_corpus(cached).skipped == {"contaminated": 1}
    (tmp_path / "bench.jsonl").write_text('{"question": "something else altogether"}\n')
    assert open_corpus(cached).skipped == {}, "another benchmark, another folder of tokens"

    folder = tmp_path / "tokens"
    tokenize(folder, list_files(source), DataConfig(), ByteTokenizer())
    assert TokenFolder(folder).skipped == {}
    with pytest.raises(UserError, match="has tokens alone; tokenize it with --benchmark"):
        open_corpus(DataConfig(source=str(folder), benchmark=config.benchmark))
