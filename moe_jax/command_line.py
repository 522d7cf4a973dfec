"""What all commands share: flags, and a user's mistake answered in one sentence, exit code 2."""

import itertools
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from moe_jax.config import UserError, field_names
from moe_jax.fields import RunError, unknown_field

# Exit codes with which nothing is to be restarted.
MISTAKE, GIVEN_UP = 2, 3
HELP = ("--help", "-help", "--helpfull", "-h")


def run(main: Callable[[list[str]], None], most_arguments: int = 0) -> None:
    """Parses the flags and calls `main` with the command and the arguments that are left.

    Args:
      most_arguments: that are no flags; more are refused.
    """
    if not set(HELP).isdisjoint(sys.argv[1:]):
        print(_help(main.__module__))
        sys.exit()
    app.run(lambda arguments: _guarded(main, arguments, most_arguments), flags_parser=_parse)


def config_name(flag: flags.FlagHolder[ConfigDict]) -> str:
    """ "tiny" for --config=configs/tiny.py, "mixtral_tiny" for --config=configs/mixtral.py:tiny."""
    file, _, argument = config_flags.get_config_filename(flags.FLAGS[flag.name]).partition(":")
    return "_".join([Path(file).stem, argument]).rstrip("_")


def check_writable(*files: flags.FlagHolder[str | None]) -> None:
    """Before the work whose result would be lost.

    Raises:
      UserError: a flag names a folder, or a file where none can be.
    """
    for flag in files:
        path = Path(flag.value or "unused")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(
                f"--{flag.name}={path} cannot be written; name a file in a folder of yours"
            )


def _guarded(main: Callable[[list[str]], None], arguments: list[str], most: int) -> None:
    if len(arguments) > 1 + most:
        _refuse(f"{arguments[1 + most]!r} is no flag; flags begin with --")
    try:
        main(arguments)
    except UserError as error:
        _refuse(str(error))
    except RunError as error:
        _refuse(str(error), GIVEN_UP)


def _parse(arguments: list[str]) -> list[str]:
    file = None
    for argument, following in itertools.pairwise([*arguments[1:], ""]):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config") and (equals or following):
            file = (value if equals else following).partition(":")[0]
            if not Path(file).is_file():
                _refuse(f"--config={file}: there is no such file")
        elif name.startswith(("--config.", "-config.")):
            _check_field(name.lstrip("-"))
            if file is None:
                _refuse(f"{name} must come after --config, as in --config=configs/tiny.py")
    try:
        return flags.FLAGS(arguments)
    except Exception as error:  # whatever goes wrong here, in the config file too, is the user's
        place = "" if isinstance(error, flags.Error) else f"--config={file}: "
        _refuse(_in_config_file(error, file) or place + str(error).splitlines()[0])


def _in_config_file(error: BaseException | None, file: str | None) -> str | None:
    """What went wrong in the config file, with the place; None if it did not happen there."""
    while file and error:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if Path(frame.filename) == Path(file):
                # ConfigDict lists all of a group's fields before it names the nearest.
                text = re.sub(r" Other fields present: .*}\"", "", str(error))
                text = re.sub("^'(.*)'$", r"\1", text).replace(r"\n", " ")
                return f"{file}:{frame.lineno}: {' '.join(text.split())}"
        error = error.__context__
    return None


def _check_field(path: str) -> None:
    """Refuses a field that does not exist; the flags library would say no more than that."""
    names = path.split(".")
    for depth in range(1, len(names)):
        siblings = field_names(".".join(names[:depth]))
        if names[depth] not in siblings:
            _refuse(unknown_field(".".join(names[: depth + 1]), siblings))


def _help(module: str) -> str:
    """The docstring of a command's module and its flags, in 80 columns."""
    paragraphs = [
        "  " + text.strip() if text.startswith(" ") else textwrap.fill(text, 80)
        for text in (sys.modules[module].__doc__ or "").strip().split("\n\n")
    ]
    known = flags.FLAGS.get_key_flags_for_module(sys.modules[module])
    rows = {f"--{flag.name}": flag.help or "" for flag in known}
    if "--config" in rows:
        rows["--config.GROUP.FIELD=VALUE"] = "Any field of the config; see moe_jax/config.py."
    width = 2 + max(len(name) for name in rows)
    lines = [
        textwrap.fill(
            " ".join(text.split()),
            80,
            initial_indent=f"  {name:<{width}}",
            subsequent_indent=" " * (width + 2),
        )
        for name, text in rows.items()
    ]
    return "\n\n".join([*paragraphs, "\n".join(lines)])


def _refuse(sentence: str, code: int = MISTAKE) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)
