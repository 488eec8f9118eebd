"""A setting: a field of a frozen dataclass whose limits and meaning stand where it is defined.

    @dataclass(frozen=True, kw_only=True)
    class Rules:
        max_rounds: int = setting(5, "exchanges at most; in one, both sides speak once", least=1)

        def __post_init__(self) -> None:
            check("dialogue", self)

Every layer defines the settings of what it does; a run's configuration is made of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


class Shares(Mapping[str, float]):
    """Weights by name, a TOML inline table: what counts is each one's part of their sum."""

    def __init__(self, weights: Mapping[str, float] = MappingProxyType({})) -> None:
        self._weights = dict(weights)

    def __getitem__(self, name: str) -> float:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __hash__(self) -> int:
        return hash(frozenset(self._weights.items()))

    def __repr__(self) -> str:
        return repr(self._weights)

    @property
    def parts(self) -> dict[str, float]:
        """Those above 0, in the order of their names, so that they add up to 1."""
        total = sum(self._weights[name] for name in sorted(self))
        return {name: self._weights[name] / total for name in sorted(self) if self._weights[name]}

    @property
    def is_valid(self) -> bool:
        """Whether none is below 0, and their sum is above."""
        weights = self._weights.values()
        return not weights or (min(weights) >= 0 and 0 < sum(weights) < math.inf)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a value must obey: `least`, `most` and `gap` are accepted themselves, `above` is not. Of a
    tuple, `one_of` speaks of the items, of `Shares` it and `form` speak of the names; None is no limit, but
    inf is never accepted.

    `form` is a regular expression for all of a string. `words` say what is accepted where the limits would
    say it badly.
    """

    meaning: str
    least: float | None = None
    above: float | None = None
    most: float | None = None
    one_of: Collection[str] = ()
    form: str = ""
    words: str = ""
    gap: float = 0.0  # nothing between 0 and this is accepted

    @property
    def accepted(self) -> str:
        """In words; "" where any value of the type is accepted."""
        if self.words:
            return self.words
        if self.one_of:
            return f"one of {', '.join(map(repr, self.one_of))}"
        if self.above is not None:
            return f"above {self.above:g}" + ("" if self.most is None else f" and up to {self.most:g}")
        if self.least is not None or self.most is not None:
            but = f", nothing between 0 and {self.gap:g}" if self.gap else ""
            return f"{_plain(self.least)} to {_plain(self.most)}{but}"
        return ""

    def accepts(self, item: Any) -> bool:
        """Whether a value, or an item of a tuple, is within them."""
        if self.one_of:
            return item in self.one_of
        if self.form:
            return re.fullmatch(self.form, item, re.DOTALL) is not None
        if self.least is None and self.above is None and self.most is None:
            return True
        return (
            math.isfinite(item)
            and (self.least is None or item >= self.least)
            and (self.above is None or item > self.above)
            and (self.most is None or item <= self.most)
            and not 0 < item < self.gap
        )


class Options(dict[str, Any]):
    """A setting that is a table: keys and values that only their receiver knows."""

    def __hash__(self) -> int:  # type: ignore[override]  # a dataclass takes no default without one
        return hash(frozenset(self))


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A dataclass field with `Limits`."""
    return dataclasses.field(default=default, metadata={"limits": Limits(meaning=meaning, **limits)})


def like(owner: Any, name: str) -> Any:
    """The setting `name` of another dataclass: its default, limits and meaning."""
    field = next(f for f in dataclasses.fields(owner) if f.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


def keys(owner: Any) -> list[dataclasses.Field[Any]]:
    """The settings of a dataclass, or of an object of it: its other fields are nothing that a user sets."""
    return [field for field in dataclasses.fields(owner) if "limits" in field.metadata]


def limits(field: dataclasses.Field[Any]) -> Limits:
    """Of a field made by `setting`."""
    accepted: Limits = field.metadata["limits"]
    return accepted


def check(section: str, values: Any, names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise ValueError for the first setting out of its limits; it names `section.key`, the value and what is
    accepted.

    `names` holds the keys that are called otherwise than their fields.
    """
    for field in keys(values):
        value, accepted = getattr(values, field.name), limits(field)
        key = names.get(field.name, field.name)
        if isinstance(value, Shares) and not value.is_valid:
            raise ValueError(f"{section}.{key} = {value}: accepted is no weight below 0 and a sum above it")
        for item in value if isinstance(value, tuple | Shares) else (value,):
            if not accepted.accepts(item):
                shown = json.dumps(item) if accepted.words else repr(item)
                raise ValueError(f"{section}.{key} = {shown}: accepted is {accepted.accepted}")


def _plain(limit: float | None) -> str:
    return "any" if limit is None else str(limit)
