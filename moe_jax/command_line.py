"""What all commands share: flags, and a user's mistake answered in one sentence, exit code 2."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from moe_jax.config import UserError, field_names, unknown_field


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags and calls `main` with the arguments that are left."""
    app.run(lambda arguments: _guarded(main, arguments), flags_parser=_parse)


def config_name(flag: flags.FlagHolder[ConfigDict]) -> str:
    """ "tiny" for --config=configs/tiny.py."""
    return Path(config_flags.get_config_filename(flags.FLAGS[flag.name])).stem


def _guarded(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    if len(arguments) > 1:
        _refuse(f"{arguments[1]!r} is no flag; flags begin with --")
    try:
        main(arguments)
    except UserError as error:
        _refuse(str(error))


def _parse(arguments: list[str]) -> list[str]:
    for argument in arguments[1:]:
        flag = argument.split("=")[0].lstrip("-")
        if flag.startswith("config."):
            _check_field(flag)
        if flag == "config":
            file = argument.partition("=")[2]
            if file and not Path(file).is_file():
                _refuse(f"--config={file}: there is no such file")
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        _refuse(str(error).splitlines()[0])


def _check_field(path: str) -> None:
    """Refuses a field that does not exist; the flags library would say no more than that."""
    names = path.split(".")
    for depth in range(1, len(names)):
        siblings = field_names(".".join(names[:depth]))
        if names[depth] not in siblings:
            _refuse(unknown_field(".".join(names[: depth + 1]), siblings))


def _refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
