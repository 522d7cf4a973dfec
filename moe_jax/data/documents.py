"""From what a file holds to a document: a text, or a chat of which answers alone are trained on."""

import json
from typing import Any, NamedTuple

from moe_jax.config import DataConfig
from moe_jax.fields import UserError

ANSWERS = "assistant"  # the role whose messages are trained on


class Piece(NamedTuple):
    """A part of a document."""

    text: bytes  # UTF-8
    weight: float = 1.0  # of its tokens in the loss, as targets
    marks: bool = False  # special tokens are read in it; elsewhere their text is text


Document = tuple[Piece, ...]


class Invalid(UserError):
    """A file or record that cannot be used; `reason` is what is counted when it is skipped."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def from_text(raw: bytes, place: str) -> Document:
    """A whole text file.

    Raises:
      Invalid: it is empty or not UTF-8.
    """
    if not raw:
        raise Invalid("empty file", f"{place} is empty")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Invalid(
            "invalid UTF-8",
            f"{place}:{line} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset "
            f"{error.start} of the file",
        ) from None
    return (Piece(raw),)


def from_json(raw: bytes, config: DataConfig, place: str) -> Document:
    """A record written as a JSON object.

    Raises:
      Invalid: it is none, or see `from_record`.
    """
    try:
        record = json.loads(raw.rstrip(b"\r\n"))  # or an error's column is the next line's
    except UnicodeDecodeError as error:
        raise Invalid("invalid UTF-8", f"{place} is not UTF-8 text: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise Invalid(
            "record that does not parse",
            f"{place} is not JSON: {error.msg} at column {error.colno}",
        ) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep a nest
        raise Invalid("record that does not parse", f"{place} is not read: {error}") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise Invalid("record without text", f"{place} is a JSON {kind}, not an object")
    return from_record(record, config, place)


def from_record(record: dict[str, Any], config: DataConfig, place: str) -> Document:
    """Fields by name, as `config.records` says.

    Raises:
      Invalid: a field is missing or empty, or holds something else.
    """
    if config.records == "text":
        return (Piece(_field(record, "text_field", config, place)),)
    if config.records == "pairs":
        return _chat(
            [
                ("user", _field(record, "prompt_field", config, place)),
                (ANSWERS, _field(record, "answer_field", config, place)),
            ],
            config,
        )
    messages = record.get(config.messages_field)
    if not isinstance(messages, list) or not messages:
        raise _missing(record, "messages_field", config, place)
    turns = []
    for i, message in enumerate(messages):
        part = message if isinstance(message, dict) else {}
        role, content = part.get("role"), part.get("content")
        if not (isinstance(role, str) and role and isinstance(content, str)):
            raise Invalid(
                "record without text",
                f"{place} has no role and content in message {i + 1} of field "
                f"{config.messages_field!r}",
            )
        turns.append((role, _encoded(content, f"message {i + 1}", place)))
    if ANSWERS not in (role for role, _ in turns):
        raise Invalid(
            "chat without an answer", f"{place} has no message of the role {ANSWERS!r} to train on"
        )
    return _chat(turns, config)


def _chat(turns: list[tuple[str, bytes]], config: DataConfig) -> Document:
    """Each message in the config's form; answers weigh 1, and what ends them."""
    pieces = []
    for role, content in turns:
        before, after = (
            part.encode()
            for part in config.message_format.replace("{role}", role).split("{content}")
        )
        weight = float(role == ANSWERS)
        pieces += [
            Piece(before, 0.0, marks=True),
            Piece(content, weight),
            Piece(after, weight, marks=True),
        ]
    return tuple(piece for piece in pieces if piece.text)


def _field(record: dict[str, Any], name: str, config: DataConfig, place: str) -> bytes:
    field = getattr(config, name)
    if not isinstance(record.get(field), str) or not record[field]:
        raise _missing(record, name, config, place)
    return _encoded(record[field], f"field {field!r}", place)


def _encoded(text: str, what: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise Invalid("invalid UTF-8", f"{place} has half a surrogate pair in {what}") from None


def _missing(record: dict[str, Any], name: str, config: DataConfig, place: str) -> Invalid:
    field = getattr(config, name)
    kind = "messages" if name == "messages_field" else "text"
    what = f"no {kind} in field" if field in record else "no field"
    has = ", ".join(sorted(record)) or "no fields"
    return Invalid(
        "record without text", f"{place} has {what} {field!r} (config.data.{name}); it has {has}"
    )
