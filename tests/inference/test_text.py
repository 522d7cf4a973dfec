"""Text of tokens as they come is the text of all of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.tokenizer import BOUNDARY, ByteTokenizer, IdTokenizer
from moe_jax.inference.text import TextStream

BYTES = ByteTokenizer()
PROMPT = BYTES.prompt("def ")


def _parts(stream: TextStream, chunks: list[list[int]]) -> list[str]:
    return [stream.add(chunk, last=i == len(chunks) - 1) for i, chunk in enumerate(chunks)]


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(st.text(), st.integers(1, 3), st.text(max_size=3))
def test_the_parts_are_the_whole_and_no_character_is_split(text: str, size: int, prompt: str):
    ids = [*BYTES.encode([text.encode()])[0].tolist(), BOUNDARY]
    chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
    parts = _parts(TextStream(BYTES, BYTES.prompt(prompt)), chunks)
    assert "".join(parts) == text


def test_a_character_waits_for_its_bytes_and_no_longer() -> None:
    stream = TextStream(BYTES, PROMPT)
    chunks = [[byte] for byte in "aé€".encode()]
    assert [stream.add(chunk) for chunk in chunks] == ["a", "", "é", "", "", "€"]
    # Bytes that are no character come with the next one, or with the end.
    assert [stream.add([0xFF]), stream.add([ord("b")]), stream.add([0xC3], last=True)] == [
        "",
        "\ufffdb",
        "\ufffd",
    ]


def test_a_character_that_the_prompt_began() -> None:
    stream = TextStream(BYTES, np.array([ord("a"), 0xC3]))
    assert stream.add([0xA9]) == "é"


@pytest.mark.parametrize(
    ("stops", "text", "parts", "stopped"),
    [
        ([], "abc", ["a", "b", "c"], False),
        (["b"], "abc", ["a", "", ""], True),
        (["cde"], "abcdef", ["a", "b", "", "", "", ""], True),
        (["cde"], "abcdx", ["a", "b", "", "", "cdx"], False),
        (["cde"], "abcd", ["a", "b", "", "cd"], False),  # the end of the text frees it
        (["aab"], "aaab", ["", "", "a", ""], True),
        (["xyz", "bc"], "abc", ["a", "", ""], True),
    ],
)
def test_stops(stops: list[str], text: str, parts: list[str], stopped: bool) -> None:
    stream = TextStream(BYTES, PROMPT, stops)
    assert _parts(stream, [[byte] for byte in text.encode()]) == parts
    assert stream.stopped == stopped


def test_the_first_of_several_stops_in_one_step_counts() -> None:
    stream = TextStream(BYTES, PROMPT, ["d", "bc"])
    assert stream.add(list(b"abcd")) == "a"


def test_ids_without_text() -> None:
    stream = TextStream(IdTokenizer(), np.arange(20))
    assert [stream.add([7]), stream.add([]), stream.add([8, 9])] == [",7", "", ",8,9"]
