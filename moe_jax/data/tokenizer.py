"""Text to token ids and back."""

from collections.abc import Sequence

import numpy as np

BOUNDARY = 256  # stands before and after each document


class ByteTokenizer:
    """Ids 0 to 255 are bytes; 256 is the boundary between documents."""

    vocab_size = 257

    def encode(self, text: str) -> np.ndarray:
        """[bytes] int32, without boundaries."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_document(self, text: bytes) -> np.ndarray:
        """[bytes + 2] int32: a boundary, the bytes, a boundary."""
        return np.concatenate(
            [[BOUNDARY], np.frombuffer(text, np.uint8), [BOUNDARY]], dtype=np.int32
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; boundaries are left out, broken UTF-8 is shown as the replacement character."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")
