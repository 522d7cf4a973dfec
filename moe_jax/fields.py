"""Nested groups of fields: frozen dataclasses from mappings, as JSON, and compared."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake of the user's: a command answers it with its sentence alone and exit code 2."""


class RunError(RuntimeError):
    """What ends a run and would end it again: a command says its sentence, with exit code 3."""


def build(cls: type, raw: Any, path: str = "config") -> Any:
    """A dataclass from nested mappings.

    Raises:
      ValueError: a field that does not exist, or a value of the wrong type.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{path} must be a group of fields, not {raw!r}")
    types_of = typing.get_type_hints(cls)
    for name in raw:
        if name not in types_of:
            raise UserError(unknown_field(f"{path}.{name}", list(types_of)))
    values = {}
    for name, kind in types_of.items():
        if name not in raw:
            continue
        value, place = raw[name], f"{path}.{name}"
        if dataclasses.is_dataclass(kind):
            values[name] = build(typing.cast(type, kind), value, place)
        elif typing.get_origin(kind) is tuple:
            values[name] = _tuple(kind, value, place)
        else:
            values[name] = _one_of(kind, value, place)
    return cls(**values)


def _tuple(kind: Any, value: Any, place: str) -> tuple[Any, ...]:
    item = typing.get_args(kind)[0]
    if not isinstance(value, tuple | list) or not value:
        raise UserError(f"{place} must be a tuple of {item.__name__.lower()}s, not {value!r}")
    one: Any = build if dataclasses.is_dataclass(item) else _one_of
    return tuple(one(item, v, f"{place}[{i}]") for i, v in enumerate(value))


def _one_of(kind: Any, value: Any, place: str) -> Any:
    """A value of a type or of one of a union's."""
    allowed = typing.get_args(kind) or (kind,)
    for option in allowed:
        if typing.get_origin(option) is tuple and isinstance(value, tuple | list):
            return _tuple(option, value, place)
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join(map(_name, allowed))
        raise UserError(f"{place} must be of type {names}, not {value!r}")
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{place}={value} must be a finite number")
    return value


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a tuple of {typing.get_args(kind)[0].__name__.lower()}s"
    return "None" if kind is types.NoneType else kind.__name__


def unknown_field(path: str, siblings: list[str]) -> str:
    """The sentence for a field that does not exist."""
    parent, _, name = path.rpartition(".")
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    if not close:
        return f"{path} does not exist; {parent} has {', '.join(siblings)}"
    return f"{path} does not exist; did you mean {parent}.{close[0]}?"


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dicts and lists, as JSON gives them back, of a config or a group of it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      ValueError: it holds none.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is no JSON object")
    return value


def differing(before: Any, now: Any, path: str = "config") -> dict[str, tuple[Any, Any]]:
    """What differs between two results of `to_dict`: both values by the field's whole name."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {path: (before, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**before, **now}:
        found |= differing(before.get(name), now.get(name), f"{path}.{name}")
    return found
