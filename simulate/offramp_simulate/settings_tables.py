"""Tables of TOML into frozen dataclasses: unknown keys, wrong types and values are named, with a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from offramp_common.errors import ConfigError

T = TypeVar("T")


def build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A `kind` (a dataclass) with these values. ConfigError names the table `where`, the key, the limit."""
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # any dataclass
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{meant(key, list(known))}")
    for name, entry in known.items():
        bare = entry.default is MISSING and entry.default_factory is MISSING
        if bare and name not in values:
            raise ConfigError(f"{where}: {name} is missing; give a {_words(hints[name])}")
    checked = {key: _value(value, hints[key], f"{where}: {key}") for key, value in values.items()}
    try:
        return kind(**checked)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def meant(key: str, known: list[str]) -> str:
    """The end of a message about a name that is not known."""
    near = difflib.get_close_matches(key, known, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are: {', '.join(sorted(known))}"


def at_least(value: float, lowest: float, name: str) -> None:
    """ConfigError for a value below its limit, or none at all."""
    if not value >= lowest:
        raise ConfigError(f"{name} = {value}: must be at least {lowest:g}")


def above(value: float, limit: float, name: str) -> None:
    if not value > limit:
        raise ConfigError(f"{name} = {value}: must be above {limit:g}")


def one_of(value: str, names: tuple[str, ...], name: str) -> None:
    if value not in names:
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(names)}")


def _value(value: Any, hint: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        origin = get_origin(option) or option
        if origin is tuple and isinstance(value, list):
            inner = get_args(option)[0]
            return tuple(_value(entry, inner, where) for entry in value)
        if isinstance(value, bool):
            if origin is bool:
                return value
        elif origin is float and isinstance(value, int | float):
            return float(value)
        elif isinstance(origin, type) and isinstance(value, origin):
            return value
    raise ConfigError(f"{where} = {value!r}: must be a {_words(hint)}")


def _words(hint: Any) -> str:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = {float: "number", int: "whole number", str: "text", bool: "true or false"}
    return " or ".join(
        names.get(get_origin(option) or option, "list")
        for option in options
        if option is not type(None)
    )
