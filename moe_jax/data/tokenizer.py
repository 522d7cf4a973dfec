"""Text to token ids and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from moe_jax.config import UserError
from moe_jax.fields import read_json

BOUNDARY = 256  # stands before and after each document


class Tokenizer(Protocol):
    """What writing text needs; `end_ids` are those after which a text has ended."""

    end_ids: frozenset[int]

    def prompt(self, text: str) -> np.ndarray:
        """[tokens] int32: text that is to be continued, as a document begins."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; ids that are none are left out, broken UTF-8 is shown as U+FFFD."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes; 256 is the boundary between documents."""

    vocab_size = 257
    end_ids = frozenset([BOUNDARY])

    def encode(self, text: str) -> np.ndarray:
        """[bytes] int32, without boundaries."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def prompt(self, text: str) -> np.ndarray:
        """[1 + bytes] int32: a boundary, the bytes."""
        return np.concatenate([[BOUNDARY], self.encode(text)], dtype=np.int32)

    def encode_document(self, text: bytes) -> np.ndarray:
        """[bytes + 2] int32: a boundary, the bytes, a boundary."""
        return np.concatenate(
            [[BOUNDARY], np.frombuffer(text, np.uint8), [BOUNDARY]], dtype=np.int32
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; boundaries are left out, broken UTF-8 is shown as the replacement character."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, with what the files beside it say of the begin and the end of a text.

    Raises:
      ValueError: a file is broken.
    """

    def __init__(self, folder: Path):
        file = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no other class
            raise UserError(f"{file} is no tokenizer: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        self._begin_id = self._id(config.get("bos_token")) if config.get("add_bos_token") else None
        ends = _read_json(folder / "generation_config.json").get("eos_token_id")
        if ends is None:
            ends = self._id(config.get("eos_token"))
        ends = ends if isinstance(ends, list) else [ends]
        self.end_ids = frozenset(end for end in ends if end is not None)

    def prompt(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text).ids
        # Some files have the begin among their own rules, others leave it to who reads them.
        if self._begin_id is not None and ids[:1] != [self._begin_id]:
            ids = [self._begin_id, *ids]
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def _id(self, token: Any) -> int | None:
        """Of a special token, which stands as its text or as an object with it."""
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else self._tokenizer.token_to_id(text)


class IdTokenizer:
    """No text at all: ids as they are typed, "1,2,3"."""

    end_ids = frozenset()

    def prompt(self, text: str) -> np.ndarray:
        raise UserError(
            "the checkpoint has no tokenizer, so text cannot be read; give token ids instead"
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return ",".join(str(int(i)) for i in ids)


def open_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """That of a model: of a folder's tokenizer.json; of bytes if the vocabulary is for them.

    Without either, ids alone can be read and written.
    """
    if (folder / "tokenizer.json").is_file():
        return FileTokenizer(folder)
    # Training here reads bytes; a vocabulary rounded up for the hardware is still theirs.
    if ByteTokenizer.vocab_size <= vocab_size <= 512:
        return ByteTokenizer()
    return IdTokenizer()


def _read_json(file: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    return read_json(file) if file.is_file() else {}
