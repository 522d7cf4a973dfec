"""Documents by index, as tokens, and which of them are held out."""

import collections
import dataclasses
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.files import Files, list_files
from moe_jax.data.formats import format_of
from moe_jax.data.token_folder import TokenFolder, is_token_folder
from moe_jax.data.tokenization import cached
from moe_jax.data.tokenizer import TrainingTokenizer, load_tokenizer
from moe_jax.fields import UserError

# A corpus of few documents is shared out in about so many spans, of at least so many predictions:
# streams that outnumber the spans would each read the same text at the same step.
FEW_DOCUMENTS = 64
SHORTEST_CUT = 4096


class Span(NamedTuple):
    """Predictions [start, stop) of a document.

    Prediction p has token p as its input and token p + 1 as its target, where token 0 is the
    boundary before the text; so a document of n tokens has n + 1 predictions.
    """

    document: int
    start: int
    stop: int


class Corpus(Protocol):
    """Documents at random.

    Attributes:
      lengths: [documents] int64, tokens without the boundaries.
      fingerprint: of lengths and contents in order, wherever the files lie.
      skipped: reason -> count of files and records that were left out.
    """

    lengths: np.ndarray
    fingerprint: str
    skipped: collections.Counter[str]

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Document i between two boundaries, and the loss's weight of each token as a target.

        [length + 2] int32 and float32.
        """
        ...

    def name(self, i: int) -> str:
        """Where document i comes from."""
        ...


def open_corpus(config: DataConfig) -> Corpus:
    """The documents of `config.source`.

    Bytes are read where they lie, if the files can be read at random. All else is made a folder of
    tokens first, in `config.cache`, and found there the next time.

    Raises:
      UserError: nothing matches, nothing is left, or a file or record cannot be used and
        `config.skip_invalid` is False.
    """
    path = Path(config.source).expanduser()
    if is_token_folder(path):
        corpus: Corpus = TokenFolder(path)
    else:
        if config.source == "stdlib":
            # Its empty files are nobody's mistake: they are skipped and counted.
            config = dataclasses.replace(config, skip_invalid=True)
        files, tokenizer = list_files(config.source), load_tokenizer(config.tokenizer)
        at_random = all(format_of(file.path).random_access for file in files)
        if at_random and config.tokenizer == "bytes":
            corpus = Files(files, config)
        else:
            corpus = TokenFolder(cached(files, config, tokenizer))
    if not len(corpus.lengths):
        counts = ", ".join(f"{count} {reason}" for reason, count in corpus.skipped.items())
        raise UserError(f"config.data.source={config.source!r} has no usable document: {counts}")
    return corpus


def open_tokenizer(config: DataConfig) -> TrainingTokenizer:
    """That of the corpus: a folder of tokens has its own."""
    path = Path(config.source).expanduser()
    return (
        TokenFolder(path).tokenizer if is_token_folder(path) else load_tokenizer(config.tokenizer)
    )


def split_holdout(corpus: Corpus, every: int) -> tuple[list[Span], list[Span]]:
    """Training and held-out spans; together they are every prediction of the corpus once.

    Every `every`-th document is held out whole. A corpus of fewer documents, such as one big file,
    holds out the last 1 / `every` of each document. 0 holds out nothing. The long documents of a
    corpus of few are several training spans each.
    """
    training, held_out = _split(corpus, every)
    if len(corpus.lengths) < FEW_DOCUMENTS:
        total = sum(span.stop - span.start for span in training)
        size = max(SHORTEST_CUT, -(-total // FEW_DOCUMENTS))
        training = [
            Span(document, cut, min(cut + size, stop))
            for document, start, stop in training
            for cut in range(start, stop, size)
        ]
    return training, held_out


def _split(corpus: Corpus, every: int) -> tuple[list[Span], list[Span]]:
    whole = [Span(i, 0, int(length) + 1) for i, length in enumerate(corpus.lengths)]
    if not every:
        return whole, []
    if len(corpus.lengths) >= every:
        return (
            [span for i, span in enumerate(whole, start=1) if i % every],
            [span for i, span in enumerate(whole, start=1) if i % every == 0],
        )
    cuts = [span.stop - max(1, span.stop // every) for span in whole]
    return (
        [Span(s.document, 0, cut) for s, cut in zip(whole, cuts, strict=True) if cut],
        [Span(s.document, cut, s.stop) for s, cut in zip(whole, cuts, strict=True)],
    )
