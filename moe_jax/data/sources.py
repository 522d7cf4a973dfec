"""The corpus of a config: its sources opened, one after the other."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.corpus import Corpus
from moe_jax.data.files import Files, Screen, list_files
from moe_jax.data.fill_in_middle import FillInMiddle
from moe_jax.data.formats import at_random, format_of
from moe_jax.data.ngrams import open_screen
from moe_jax.data.token_folder import TokenFolder, is_token_folder
from moe_jax.data.tokenization import cached
from moe_jax.data.tokenizer import TrainingTokenizer, load_tokenizer
from moe_jax.fields import UserError


class Mixture:
    """The documents of all sources, numbered through: a `Corpus` as well.

    Attributes:
      parts: the corpus of each source.
      tokenizer: that all of them are of.
    """

    def __init__(self, parts: Sequence[Corpus], tokenizer: TrainingTokenizer, weights: list[float]):
        self.parts, self.tokenizer = parts, tokenizer
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.skipped = sum((part.skipped for part in parts), collections.Counter())
        self.fingerprint = parts[0].fingerprint
        if len(parts) > 1:
            text = json.dumps([[part.fingerprint for part in parts], weights])
            self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._first = np.cumsum([0, *(len(part.lengths) for part in parts)])

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part, of_part = self._find(i)
        return part.tokens(of_part)

    def name(self, i: int) -> str:
        part, of_part = self._find(i)
        return part.name(of_part)

    def _find(self, i: int) -> tuple[Corpus, int]:
        part = int(np.searchsorted(self._first, i, "right")) - 1
        return self.parts[part], i - int(self._first[part])


def open_corpus(config: DataConfig, vocab_size: int | None = None) -> Mixture:
    """The documents of `config.source`.

    Bytes are read where they lie, if the files can be read at random. All else is made a folder of
    tokens first, in `config.cache`, and found there the next time.

    Args:
      vocab_size: of the model, if there is one.
    Raises:
      UserError: nothing matches, nothing is left, a file or record cannot be used and
        `config.skip_invalid` is False, the sources are of several tokenizers, or the model lacks
        ids.
    """
    screen = open_screen(config)
    opened = [_open_source(source.path, config, vocab_size, screen) for source in config.sources]
    tokenizer = opened[0][1]
    for source, (_, other) in zip(config.sources, opened, strict=True):
        if other.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"config.data.source has {config.sources[0].path!r} and {source.path!r}, whose "
                "tokens are of two tokenizers; tokenize them with one"
            )
    parts: list[Corpus] = [corpus for corpus, _ in opened]
    if config.fim_rate:
        if tokenizer.fill is None:
            raise UserError(
                f"config.data.fim_rate={config.fim_rate} needs tokens that begin prefix, suffix "
                f"and middle, and config.data.tokenizer={config.tokenizer!r} has none that is known"
            )
        parts = [
            FillInMiddle(part, tokenizer.fill, config.fim_rate, config.fim_spm_rate)
            for part in parts
        ]
    return Mixture(parts, tokenizer, [source.weight for source in config.sources])


def _open_source(
    source: str, config: DataConfig, vocab_size: int | None, screen: Screen | None
) -> tuple[Corpus, TrainingTokenizer]:
    path = Path(source).expanduser()
    if is_token_folder(path):
        if screen:
            raise UserError(
                f"config.data.benchmark={config.benchmark!r} is looked for in text, and {source} "
                "has tokens alone; tokenize it with --benchmark"
            )
        corpus: Corpus = TokenFolder(path)
        tokenizer = corpus.tokenizer
        _check_vocabulary(config, tokenizer, vocab_size)
    else:
        if source == "stdlib":
            # Its empty files are nobody's mistake: they are skipped and counted.
            config = dataclasses.replace(config, skip_invalid=True)
        files, tokenizer = list_files(source), load_tokenizer(config.tokenizer)
        _check_vocabulary(config, tokenizer, vocab_size)
        all_at_random = all(at_random(format_of(file.path)) for file in files)
        if all_at_random and config.tokenizer == "bytes":
            corpus = Files(files, config, screen)
        else:
            corpus = TokenFolder(cached(files, config, tokenizer, screen))
    if not len(corpus.lengths):
        counts = ", ".join(f"{count} {reason}" for reason, count in corpus.skipped.items())
        raise UserError(f"config.data.source={source!r} has no usable document: {counts}")
    return corpus, tokenizer


def _check_vocabulary(
    config: DataConfig, tokenizer: TrainingTokenizer, vocab_size: int | None
) -> None:
    fill = (tokenizer.fill or ()) if config.fim_rate else ()
    size = max(tokenizer.vocab_size, *(token + 1 for token in fill), 0)
    if vocab_size is not None and size > vocab_size:
        raise UserError(
            f"config.model.vocab_size={vocab_size} must be at least the tokenizer's {size}"
        )
