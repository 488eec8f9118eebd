"""How a scripted negotiator of `deal` says what it means; the forms are in deal_words.toml.

Offers name exactly who gets what, mostly item by item in the order of the items: what is said next to each
other needs no memory and no arithmetic across the sentence, which is what a small model learns late. For
the same reason an offer that is best for both may set the two values of each item side by side before it
says who gets it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from duologue.rollout.games.deal import ITEMS
from duologue.rollout.games.scripted import Act, phrases
from duologue.rollout.games.selection import CLOSE, Vector

TERSE = 4  # as many of a list's first forms go with an offer of many parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """How items and values are named. `frames` are what stands before an item and before the first value."""

    items: tuple[str, ...] = ITEMS
    plural: str = "s"
    ranks: Mapping[int, str] = field(default_factory=dict)  # words for values that are not said as numbers
    frames: tuple[tuple[str, str], ...] = (("", ""),) * 5 + (
        ("a ", ""),
        ("a ", "is worth "),
        ("the ", "is "),
        ("each ", ""),
    )

    def name(self, item: str, n: int) -> str:
        return item + self.plural * (n > 1)

    def rank(self, value: int) -> str:
        return self.ranks.get(value, str(value))


def utter(act: Act, counts: Vector, language: Language, rng: random.Random, *, told: bool, left: bool) -> str:
    """The act in words. `told`, `left`: the other side has stated its values, has just walked away."""

    def name(k: int) -> str:
        return language.name(language.items[k], counts[k])

    words = phrases("deal")
    said: list[str] = []
    if act.accept or act.confirm:
        said.append(rng.choice(words["agree"] if act.accept else words["confirm"]))
    if act.refuse:
        forms = (
            words["refuse"][:TERSE]
            if act.take is not None and _splits(act.take, counts) > 1
            else words["refuse"]
        )
        said.append(
            rng.choice(forms) if act.want is None else rng.choice(words["reason"]).format(name(act.want))
        )
    if act.reveal is not None and act.against is None:
        form = rng.choice(words["also"] if told and rng.random() < 0.6 else words["reveal"])
        said.append(form.format(_values(act.reveal, language, rng)))
    if act.want is not None and not act.refuse:
        said.append(rng.choice(words["want"]).format(name(act.want)))
    if act.spare is not None:
        said.append(rng.choice(words["spare"]).format(name(act.spare)))
    if act.take is not None:
        said.append(_offer(act, act.take, counts, language, rng))
    if act.ask:
        said.append(rng.choice(words["ask"]))
    if act.leave:
        said.append(rng.choice(words["bye"] if left else words["leave"]))
    if act.close:
        said += [CLOSE] if said else [rng.choice(words["hurry"]), CLOSE]
    return " ".join(said)


def _values(values: Vector, language: Language, rng: random.Random) -> str:
    article, verb = rng.choice(language.frames)
    stated = [
        f"{article}{item} {language.rank(value)}" for item, value in zip(language.items, values, strict=False)
    ]
    return " , ".join([f"{article}{language.items[0]} {verb}{language.rank(values[0])}", *stated[1:]])


def _offer(act: Act, take: Vector, counts: Vector, language: Language, rng: random.Random) -> str:
    words, items = phrases("deal"), language.items[: len(counts)]
    if act.reveal is not None and act.against is not None:
        compared = zip(
            items, map(language.rank, act.reveal), map(language.rank, act.against), take, counts, strict=True
        )
        return rng.choice(words["compare"]).format(" , ".join(_compared(*item) for item in compared))
    exact = rng.random() < 0.75
    rest = tuple(c - t for c, t in zip(counts, take, strict=True))
    if rng.random() < 0.75:
        parts = (_part(t, c, item, language, exact) for t, c, item in zip(take, counts, items, strict=True))
        forms = words["joint"] if act.best else words["by_item"]
        if not act.best and _splits(take, counts) > 1:
            forms = forms[:1]
        return rng.choice(forms).format(" , ".join(parts))
    mine, yours = (
        [_amount(n, c, item, language, exact) for n, c, item in zip(share, counts, items, strict=True) if n]
        or ["nothing"]
        for share in (take, rest)
    )
    form = rng.choice(words["offer"][:TERSE] if len(mine) + len(yours) > 4 else words["offer"])
    return form.format(" and ".join(mine), " and ".join(yours))


def _splits(take: Vector, counts: Vector) -> int:
    """How many types are divided."""
    return sum(0 < t < c for t, c in zip(take, counts, strict=True))


def _compared(item: str, mine: str, yours: str, n: int, count: int) -> str:
    """What one is worth to both sides, and who gets it: "hat 2 to 1 for me", or divided "hat 1 to 1 , 2 for
    me and 1 for you".
    """
    return f"{item} {mine} to {yours} " + (
        f", {n} for me and {count - n} for you" if 0 < n < count else f"for {'me' if n else 'you'}"
    )


def _part(n: int, count: int, item: str, language: Language, exact: bool) -> str:
    """Who gets how many of one type: "2 hats for me and 1 for you"."""
    if n in (0, count):
        return f"{_amount(count, count, item, language, exact)} for {'me' if n else 'you'}"
    return f"{_amount(n, count, item, language, exact)} for me and {count - n} for you"


def _amount(n: int, count: int, item: str, language: Language, exact: bool) -> str:
    """`n` of `count` items: "2 hats", or, when it is all of them and not `exact`, "both hats"."""
    whole = "" if exact or n < count else {1: "the", 2: "both"}.get(n, f"all {n}")
    return f"{whole or n} {language.name(item, n)}"
