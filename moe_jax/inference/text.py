"""Tokens to text as they come."""

import os
from collections.abc import Sequence

import numpy as np

from moe_jax.data.tokenizer import Tokenizer

CONTEXT = 8  # tokens of the prompt before the first new one, which tell how that is written


class TextStream:
    """The text after a prompt; only what later tokens cannot change is handed out.

    Held back are characters of which bytes are missing, and what may be the begin of a stop.

    Args:
      stops: texts before which the text ends.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stops: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, stops
        # Only the tokens from `_from` on are decoded; those before `_done` have given their text.
        self._ids = [int(token) for token in prompt[-CONTEXT:]]
        self._from, self._done = 0, len(self._ids)
        self._held = ""

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that is certain with these tokens; with `last`, all of it."""
        if self.stopped or not (tokens or last):
            return ""
        self._ids += tokens
        self._held += self._decoded(last)
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        sure = len(self._held) - keep
        text, self._held = self._held[:sure], self._held[sure:]
        return text

    def _decoded(self, last: bool) -> str:
        """The text of the new tokens, empty while its last character is not whole."""
        before = self._tokenizer.decode(self._ids[self._from : self._done])
        now = self._tokenizer.decode(self._ids[self._from :])
        if now.endswith("\ufffd") and not last:
            return ""
        self._from, self._done = self._done, len(self._ids)
        # A character that the prompt has begun may be whole by now.
        return now[len(os.path.commonprefix([before, now])) :]


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text with which `stop` begins."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
