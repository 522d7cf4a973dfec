"""Text to token ids and back."""

import hashlib
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from moe_jax.data.documents import Document
from moe_jax.fields import UserError, read_json

BOUNDARY = 256  # of bytes: stands before and after each document
# Tokens that begin the prefix, the suffix and the middle of a text whose middle comes last, by
# those who use them: ours, DeepSeek's, Qwen's, StarCoder's and Code Llama's.
FILL_IN_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
)
# Where no file says which token ends a text.
ENDS = (
    "<|endoftext|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
)
# A longer text is encoded in pieces, cut where a line ends: memory does not grow with the text.
LONGEST = 1 << 18  # characters
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


class Tokenizer(Protocol):
    """What writing text needs; `end_ids` are those after which a text has ended."""

    end_ids: frozenset[int]

    def prompt(self, text: str) -> np.ndarray:
        """[tokens] int32: text that is to be continued, as a document begins."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; ids that are none are left out, broken UTF-8 is shown as U+FFFD."""
        ...


class TrainingTokenizer(Tokenizer, Protocol):
    """What training needs besides.

    vocab_size: above all ids.
    boundary: the id before and after each document.
    fill: the ids that begin prefix, suffix and middle in fill-in-the-middle; None: there are none.
    fingerprint: of what decides which ids a text has.
    """

    vocab_size: int
    fingerprint: str

    @property
    def boundary(self) -> int: ...

    @property
    def fill(self) -> tuple[int, int, int] | None: ...

    def encode(self, texts: Sequence[bytes], marks: bool = False) -> list[np.ndarray]:
        """[tokens] int32 of each text of UTF-8, without boundaries; on all cores.

        Args:
          marks: whether special tokens are read in the texts; else their text is text.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes what `open_tokenizer` reads, if it is in files at all, and makes the folder."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes; 256 is the boundary between documents."""

    vocab_size = 257
    boundary = BOUNDARY
    fill = (257, 258, 259)
    fingerprint = "bytes"
    end_ids = frozenset([BOUNDARY])

    def encode(self, texts: Sequence[bytes], marks: bool = False) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]

    def prompt(self, text: str) -> np.ndarray:
        """[1 + bytes] int32: a boundary, the bytes."""
        return np.concatenate([[BOUNDARY], *self.encode([text.encode()])], dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; boundaries are left out, broken UTF-8 is shown as the replacement character."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        pass


class FileTokenizer:
    """A tokenizer.json, with what the files beside it say of the begin and the end of a text.

    Raises:
      ValueError: a file is broken.
    """

    def __init__(self, file: Path):
        self._file = file
        self._tokenizer = self._open()
        # The text of special tokens is text in what documents hold.
        self._plain = self._open()
        self._plain.encode_special_tokens = True
        config = _read_json(file.parent / "tokenizer_config.json")
        self._begin_id = self._id(config.get("bos_token")) if config.get("add_bos_token") else None
        ends = _read_json(file.parent / "generation_config.json").get("eos_token_id")
        end = self._id(config.get("eos_token"))
        if ends is None:
            ends = end
        ends = ends if isinstance(ends, list) else [ends]
        self.end_ids = frozenset(end for end in ends if end is not None)
        candidates = [end, *map(self._tokenizer.token_to_id, ENDS)]
        self._boundary = next((token for token in candidates if token is not None), None)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.fill = _fill(self._tokenizer.token_to_id)
        text = f"{file.read_text('utf-8')} {self._boundary}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    @property
    def boundary(self) -> int:
        """Raises:
        UserError: no token is known to end a text.
        """
        if self._boundary is None:
            raise UserError(
                f"{self._file} has no token that ends a text ({', '.join(ENDS)}); name one as "
                "eos_token in a tokenizer_config.json beside it"
            )
        return self._boundary

    def encode(self, texts: Sequence[bytes], marks: bool = False) -> list[np.ndarray]:
        pieces = [cut(text.decode()) for text in texts]
        encodings = iter(
            (self._tokenizer if marks else self._plain).encode_batch_fast(
                [piece for of_text in pieces for piece in of_text], add_special_tokens=False
            )
        )
        return [
            np.concatenate([np.array(next(encodings).ids, np.int32) for _ in of_text])
            for of_text in pieces
        ]

    def prompt(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text).ids
        # Some files have the begin among their own rules, others leave it to who reads them.
        if self._begin_id is not None and ids[:1] != [self._begin_id]:
            ids = [self._begin_id, *ids]
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def save(self, folder: Path) -> None:
        """Beside it goes that texts begin with a boundary and end with one."""
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self._file.read_bytes())
        token = self._tokenizer.id_to_token(self.boundary)
        config = {"bos_token": token, "eos_token": token, "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))

    def _open(self) -> tokenizers.Tokenizer:
        try:
            return tokenizers.Tokenizer.from_file(str(self._file))
        except Exception as error:  # the library raises no other class
            raise UserError(f"{self._file} is no tokenizer: {error}") from None

    def _id(self, token: Any) -> int | None:
        """Of a special token, which stands as its text or as an object with it."""
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else self._tokenizer.token_to_id(text)


class SentencePieceTokenizer:
    """A SentencePiece model; its end of a text is the boundary.

    Raises:
      ValueError: the file is broken, or the package is not installed.
    """

    def __init__(self, file: Path):
        try:
            library = importlib.import_module("sentencepiece")
        except ImportError:
            raise UserError(
                f"{file} needs the package sentencepiece, which is not installed; "
                'run pip install "moe_jax[data]"'
            ) from None
        self._file, content = file, file.read_bytes()
        try:
            self._model = library.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise UserError(f"{file} is no SentencePiece model") from None
        self.vocab_size = self._model.vocab_size()
        self.boundary = self._model.eos_id()
        if self.boundary < 0:
            raise UserError(f"{file} has no token that ends a text; train one with an eos_id")
        self.end_ids = frozenset([self.boundary])
        known = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        self.fill = _fill(known.get)
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, texts: Sequence[bytes], marks: bool = False) -> list[np.ndarray]:
        """What is a special token's text is the model's own choice; `marks` changes nothing."""
        ids = self._model.encode([text.decode() for text in texts], num_threads=-1)
        return [np.array(of_text, np.int32) for of_text in ids]

    def prompt(self, text: str) -> np.ndarray:
        return np.concatenate([[self.boundary], *self.encode([text.encode()])], dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._file.read_bytes())


class IdTokenizer:
    """No text at all: ids as they are typed, "1,2,3"."""

    end_ids = frozenset()

    def prompt(self, text: str) -> np.ndarray:
        raise UserError(
            "the checkpoint has no tokenizer, so text cannot be read; give token ids instead"
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return ",".join(str(int(i)) for i in ids)


def load_tokenizer(name: str) -> TrainingTokenizer:
    """That of `config.data.tokenizer`.

    Raises:
      UserError: there is none.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    for file in (path, path / "tokenizer.json", path / "tokenizer.model"):
        if file.is_file() and file.suffix in (".json", ".model"):
            return FileTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
    raise UserError(
        f"the tokenizer {name!r} is not there; give 'bytes', a tokenizer.json, a SentencePiece "
        ".model, or a folder with one"
    )


def open_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """That of a model: of a folder's files; of bytes if the vocabulary is for them.

    Without either, ids alone can be read and written.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return load_tokenizer(str(folder))
    # A vocabulary of bytes rounded up for the hardware is still theirs.
    if ByteTokenizer.vocab_size <= vocab_size <= 512:
        return ByteTokenizer()
    return IdTokenizer()


def encode_documents(
    documents: Sequence[Document], tokenizer: TrainingTokenizer
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each, its ids between two boundaries and their weights as targets.

    [tokens + 2] int32 and float32.
    """
    pieces = [piece for document in documents for piece in document]
    encoded: dict[bool, Any] = {
        marks: iter(
            tokenizer.encode([piece.text for piece in pieces if piece.marks == marks], marks)
        )
        for marks in (False, True)
    }
    result = []
    for document in documents:
        ids = [next(encoded[piece.marks]) for piece in document]
        # The boundary is trained on where what it ends is.
        weights = [0.0, *(piece.weight for piece in document), document[-1].weight]
        result.append(
            (
                np.concatenate([[tokenizer.boundary], *ids, [tokenizer.boundary]], dtype=np.int32),
                np.repeat(np.array(weights, np.float32), [1, *map(len, ids), 1]),
            )
        )
    return result


def cut(text: str) -> list[str]:
    """The text in pieces of at most `LONGEST`, if it can be cut where a line ends.

    A line break between letters is a token border for every tokenizer in use.
    """
    pieces, start = [], 0
    while len(text) - start > LONGEST:
        cuts = list(_LINE_END.finditer(text, start + LONGEST // 2, start + LONGEST))
        stop = cuts[-1].end() if cuts else start + LONGEST
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _fill(token_to_id: Any) -> tuple[int, int, int] | None:
    for names in FILL_IN_MIDDLE:
        prefix, suffix, middle = map(token_to_id, names)
        if prefix is not None and suffix is not None and middle is not None:
            return prefix, suffix, middle
    return None


def _read_json(file: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    return read_json(file) if file.is_file() else {}
