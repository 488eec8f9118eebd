"""A setting: a field of a frozen dataclass whose limits and meaning stand where it is defined.

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Rules:
        max_rounds: int = setting(5, "exchanges at most; in one, both sides speak once", least=1)

        def __post_init__(self) -> None:
            check("dialogue", self)

Every layer defines the settings of what it does; a run's configuration is made of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a value must obey. Of a tuple, `one_of` speaks of the items; None is no limit."""

    meaning: str
    least: float | None = None
    above: float | None = None
    most: float | None = None
    one_of: tuple[str, ...] = ()

    @property
    def accepted(self) -> str:
        """In words; "" where any value of the type is accepted."""
        if self.one_of:
            return f"one of {', '.join(map(repr, self.one_of))}"
        if self.above is not None:
            return f"above {self.above:g}" + ("" if self.most is None else f" and up to {self.most:g}")
        if self.least is not None or self.most is not None:
            return f"{_plain(self.least)} to {_plain(self.most)}"
        return ""

    def refused(self, value: Any) -> Iterator[Any]:
        """The value, or the items of it, that are not accepted."""
        for item in value if isinstance(value, tuple) else (value,):
            if self.one_of:
                if item not in self.one_of:
                    yield item
            elif (
                (self.least is not None and not item >= self.least)
                or (self.above is not None and not item > self.above)
                or (self.most is not None and not item <= self.most)
            ):
                yield item


def setting(
    default: Any,
    meaning: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    one_of: Sequence[str] = (),
) -> Any:
    """A dataclass field with limits: `least` and `most` are accepted themselves, `above` is not."""
    limits = Limits(meaning=meaning, least=least, above=above, most=most, one_of=tuple(one_of))
    return dataclasses.field(default=default, metadata={"limits": limits})


def limits(field: dataclasses.Field[Any]) -> Limits:
    """Of a field made by `setting`."""
    found: Limits = field.metadata["limits"]
    return found


def check(section: str, values: Any) -> None:
    """Raise ValueError for the first setting out of its limits; it names `section.key`, the value and what is accepted."""
    for field in dataclasses.fields(values):
        accepted = limits(field)
        for item in accepted.refused(getattr(values, field.name)):
            shown = repr(item) if isinstance(item, str) else item
            raise ValueError(f"{section}.{field.name} = {shown}: accepted is {accepted.accepted}")


def _plain(limit: float | None) -> str:
    return "any" if limit is None else str(limit)
