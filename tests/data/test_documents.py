"""Records as documents: texts, and chats of which answers alone are trained on."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig
from moe_jax.data.documents import Invalid, from_json, from_record
from moe_jax.data.tokenizer import ByteTokenizer, encode_documents

CHATS = DataConfig(records="chats", message_format="[{role}]{content}.")
PAIRS = DataConfig(records="pairs", message_format="{role}: {content}\n", prompt_field="question")


def _trained(record: dict[str, Any], config: DataConfig) -> tuple[str, str]:
    """The text, and what of it is trained on; the boundary at the end is "|"."""
    ((ids, weights),) = encode_documents([from_record(record, config, "x:1")], ByteTokenizer())
    shown = ["|" if i == 256 else chr(i) for i in ids[1:]]
    return "".join(shown), "".join(c for c, w in zip(shown, weights[1:], strict=True) if w)


def test_answers_alone_are_trained_on_and_what_ends_them() -> None:
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long", "extra": 1},
    ]
    assert _trained({"messages": messages}, CHATS) == (
        "[system]Be brief.[user]Hi.[assistant]Hello.[user]Bye.[assistant]So long.|",
        "Hello.So long.|",
    )
    assert _trained({"messages": messages[:4]}, CHATS)[1] == "Hello.", "a user has the last word"


def test_pairs_are_chats_of_two_messages() -> None:
    assert _trained({"question": "1 + 1?", "answer": "2"}, PAIRS) == (
        "user: 1 + 1?\nassistant: 2\n|",
        "2\n|",
    )


def test_the_default_format_is_chatml() -> None:
    text, trained = _trained({"prompt": "a", "answer": "b"}, DataConfig(records="pairs"))
    assert text == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n|")
    assert trained == "b<|im_end|>\n|"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": "a"}, "x:3 has no field 'messages' (config.data.messages_field); it has text"),
        (
            {"messages": []},
            "x:3 has no messages in field 'messages' (config.data.messages_field); it has messages",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]},
            "x:3 has no role and content in message 2 of field 'messages'",
        ),
        ({"messages": ["a"]}, "x:3 has no role and content in message 1 of field 'messages'"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "x:3 has no message of the role 'assistant' to train on",
        ),
    ],
)
def test_chats_that_cannot_be_used(record: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Invalid) as error:
        from_json(json.dumps(record).encode(), CHATS, "x:3")
    assert str(error.value) == sentence


def test_pairs_that_cannot_be_used() -> None:
    with pytest.raises(Invalid, match=r"no field 'answer' \(config.data.answer_field\)"):
        from_record({"question": "a"}, PAIRS, "x:3")


ROLES = st.sampled_from(["system", "user", "assistant"])


@settings(derandomize=True, deadline=None, database=None, max_examples=50)
@given(st.lists(st.tuples(ROLES, st.text(st.characters(codec="utf-8"))), min_size=1, max_size=6))
def test_weights_follow_roles_whatever_is_said(turns: list[tuple[str, str]]) -> None:
    """Also where a message quotes the format itself."""
    if "assistant" not in (role for role, _ in turns):
        turns = [*turns, ("assistant", "[user]{content}.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    document = from_record({"messages": messages}, CHATS, "x:1")
    ((ids, weights),) = encode_documents([document], ByteTokenizer())
    expected = [0.0]
    for role, content in turns:
        answer = float(role == "assistant")
        expected += [0.0] * len(f"[{role}]") + [answer] * len(f"{content}.".encode())
    assert weights.tolist() == [*expected, float(turns[-1][0] == "assistant")]
    assert len(ids) == len(weights)
