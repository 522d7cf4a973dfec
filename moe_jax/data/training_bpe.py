"""A byte-level BPE of one's own."""

import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from moe_jax.data.tokenizer import FILL_IN_MIDDLE, cut
from moe_jax.fields import UserError

# The boundary, those of fill-in-the-middle, and those of the default `data.message_format`.
SPECIAL = ("<|endoftext|>", *FILL_IN_MIDDLE[0], "<|im_start|>", "<|im_end|>")
SMALLEST = 256 + len(SPECIAL)


def train_bpe(file: Path, texts: Iterable[bytes], vocab_size: int) -> None:
    """Writes a tokenizer.json in which every text has ids, on all cores.

    Args:
      texts: UTF-8.
      vocab_size: at most; few texts have fewer pairs to merge.
    Raises:
      UserError: the vocabulary has no room for the bytes.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"--vocab_size={vocab_size} must be at least {SMALLEST}: bytes and special tokens"
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in cut(text.decode()))
    tokenizer.train_from_iterator(pieces, trainer)
    part = file.with_name(file.name + ".part")
    tokenizer.save(str(part))
    os.replace(part, file)
