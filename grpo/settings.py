"""Values of settings as text: TOML in and out, the type that a key wants, the name that was probably
meant."""

from __future__ import annotations

import datetime
import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from duologue.model.settings import Options, Shares


def says_all(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration is one that a run wrote whole, and not a user's own file of that name."""
    model = raw.get("model")
    written = isinstance(model, Mapping) and {"path", "dtype", "device"} <= model.keys()
    return written and {"train", "grpo", "dialogue"} <= raw.keys()


def to_toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(to_toml(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(name)} = {to_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, str):  # a JSON string is a TOML string, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else to_toml(name)


class Text(str):
    """A value as somebody typed it."""

    def parse(self, is_string: bool) -> Any:
        """A TOML value, or else the bare text; where a string is wanted only quotes make it TOML, so any path
        passes.
        """
        try:
            (value,) = tomllib.loads(f"value = {self}").values()
        except ValueError:  # it is no TOML, or more than a value
            return str(self)
        return str(self) if is_string and not isinstance(value, str) else value


def meant(got: str, known: list[str]) -> str:
    close = difflib.get_close_matches(got, known, 1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"accepted is one of {', '.join(known)}"


def typed(key: str, value: Any, default: Any) -> Any:
    """`value` in the type of the key's default."""
    if isinstance(value, Text):
        value = value.parse(isinstance(default, str))
    if isinstance(default, Options) and isinstance(value, dict):
        return Options(value)
    if isinstance(default, tuple):
        fits = isinstance(value, list)
        item = default[0] if default else ""  # an empty list is one of names
        value = tuple(typed(key, one, item) for one in value) if fits else value
    elif isinstance(default, Shares):
        fits = isinstance(value, dict)
        value = Shares({n: typed(f"{key}.{n}", v, 0.0) for n, v in value.items()}) if fits else value
    elif isinstance(default, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    else:
        fits = type(value) is type(default)
    if not fits:
        raise ValueError(f"{key} = {value!r}: accepted is {accepted_type(default)}")
    return value


def accepted_type(default: Any) -> str:
    """In words."""
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        tuple: "a list",
        Options: "a table",
        str: "a string",
        Shares: "a table of weights, e.g. {a = 0.5, b = 0.5}",
    }
    return words[type(default)]


def override_in(table: dict[str, Any], name: str, text: Text) -> None:
    """`name`, or "table.name" where the key is a table."""
    key, _, inner = name.partition(".")
    within = table.setdefault(key, {}) if inner else None
    if isinstance(within, dict):
        table[key] = {**within, inner: text.parse(is_string=False)}
    else:
        table[name] = text
