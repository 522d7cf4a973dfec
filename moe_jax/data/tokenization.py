"""Files made into a folder of tokens: on demand, into the cache, or where the user wants it."""

import collections
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe_jax.config import DataConfig
from moe_jax.data.documents import Document
from moe_jax.data.files import File, Screen, list_files, scan
from moe_jax.data.token_folder import SHARD_TOKENS, write_token_folder
from moe_jax.data.tokenizer import TrainingTokenizer
from moe_jax.data.training_bpe import train_bpe
from moe_jax.fields import UserError


def tokenize(
    folder: Path,
    files: Sequence[File],
    config: DataConfig,
    tokenizer: TrainingTokenizer,
    screen: Screen | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Writes the folder, or the rest of it, with a bar of progress on a terminal.

    Raises:
      UserError: a file or record cannot be used, or the folder holds something else.
    """
    sizes = [file.path.stat().st_size for file in files]
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=sum(sizes))

        def documents(skipped: collections.Counter[str]) -> Iterator[Document]:
            for file, place, document in scan(files, config, skipped, screen):
                progress.update(task, completed=sum(sizes[:file]) + place.offset)
                yield document

        write_token_folder(
            folder,
            documents,
            tokenizer,
            _describe(files, config),
            weighted=config.records != "text",
            shard_tokens=shard_tokens,
        )


def train_tokenizer(file: Path, files: Sequence[File], config: DataConfig, vocab_size: int) -> int:
    """Writes a tokenizer.json trained on the files' texts; returns how many bytes they are.

    Raises:
      UserError: a file or record cannot be used, or the vocabulary is too small.
    """
    if file.suffix != ".json" or not file.parent.is_dir():
        raise UserError(f"{file} cannot be written; name a .json file in a folder that is there")
    size = 0

    def texts() -> Iterator[bytes]:
        nonlocal size
        for found in scan(files, config, collections.Counter()):
            for piece in found.document:
                if not piece.marks:
                    size += len(piece.text)
                    yield piece.text

    train_bpe(file, texts(), vocab_size)
    return size


def cached(
    files: Sequence[File],
    config: DataConfig,
    tokenizer: TrainingTokenizer,
    screen: Screen | None = None,
) -> Path:
    """The folder of tokens of these files as they are now, in `config.cache`."""
    text = json.dumps([_describe(files, config), tokenizer.fingerprint])
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    cache = Path(config.cache).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    # Other processes of this run want the same; one makes it.
    with open(cache / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokenize(cache / key, files, config, tokenizer, screen)
    return cache / key


def _describe(files: Sequence[File], config: DataConfig) -> dict[str, Any]:
    """What the documents depend on."""
    fields = [
        *("records", "text_field", "messages_field", "prompt_field", "answer_field"),
        *("message_format", "skip_invalid"),
    ]
    about: dict[str, Any] = {"files": [_version(file) for file in files]}
    if config.benchmark is not None:
        about["benchmark"] = [_version(file) for file in list_files(config.benchmark)]
        fields += ["benchmark_ngrams", "benchmark_fields"]
    return {**about, **{name: getattr(config, name) for name in fields}}


def _version(file: File) -> list[Any]:
    stat = file.path.stat()
    return [file.name, stat.st_size, stat.st_mtime_ns]
