"""A checkpoint of one kind into the other, piece by piece."""

import dataclasses
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe_jax.config import UserError
from moe_jax.interop.huggingface import DTYPES, check_fit, write_folder
from moe_jax.interop.lazy import Lazy, flatten
from moe_jax.interop.orbax_files import TOKENIZER, find_tokenizer, write_checkpoint
from moe_jax.interop.weights import is_huggingface, read_weights

# Files beside the weights that go along.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "generation_config.json"),
)


def convert(source: Path, target: Path, dtype: str) -> None:
    """Writes `target`, which appears only once it is whole, and says what was done.

    Args:
      source: of either kind, see `weights.read_weights`; the target is of the other.
      dtype: of the target's weights, one of `DTYPES`; "float8" for Hugging Face alone.
    Raises:
      ValueError: there is something at the target, or the source is not whole.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} must be one of {', '.join(DTYPES)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--target={target} exists; give another or remove it")
    from_huggingface = is_huggingface(source)
    if from_huggingface and dtype == "float8":
        raise UserError("--dtype=float8 is a form of Hugging Face's; a checkpoint has none")
    begin = time.perf_counter()
    config, weights, notes = read_weights(source)
    check_fit(config, weights)
    for note in notes:
        print(f"note        {note}")
    total = sum(lazy.size for lazy in flatten(weights).values())
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # A console of its own: rich's shared one would keep what standard output is now.
    console, hidden = Console(), not sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=sum(x.nbytes for x in flatten(weights).values()))

        def advance(size: int) -> None:
            progress.update(task, advance=size)

        if from_huggingface:
            cast = jax.tree.map(lambda lazy: _cast(lazy, np.dtype(jnp.dtype(dtype))), weights)
            write_checkpoint(target, {"model": dataclasses.asdict(config)}, cast, advance)
            beside = source, target / TOKENIZER
        else:
            write_folder(target, config, weights, dtype, advance)
            beside = find_tokenizer(source), target
    copied = _copy(*beside)
    print(
        f"written     {target}: {total:,} weights, {dtype}"
        + (f", {', '.join(copied)}" if copied else "")
        + f" in {time.perf_counter() - begin:.1f}s"
    )


def _cast(lazy: Lazy, dtype: np.dtype) -> Lazy:
    return Lazy(lazy.shape, dtype, lambda index: lazy.read(index).astype(dtype))


def _copy(source: Path, target: Path) -> list[str]:
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if names:
        target.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
