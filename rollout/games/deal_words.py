"""How a scripted negotiator of `deal` says what it means; the forms are in deal_words.toml.

Offers name exactly who gets what, mostly item by item in the order of the items: what is said next to each
other needs no memory and no arithmetic across the sentence, which is what a small model learns late. For
the same reason an offer that is best for both may set the two values of each item side by side before it
says who gets it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from duologue.rollout.games.deal import ITEMS, less
from duologue.rollout.games.forms import SIMPLE, Forms, merged, plain
from duologue.rollout.games.scripted import Act, phrases
from duologue.rollout.games.selection import CLOSE, Vector

TERSE = 4  # as many of a list's first forms go with an offer of many parts


@dataclass(frozen=True, kw_only=True)
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

    def value(self, rank: str) -> int:
        return (
            next((value for value, word in self.ranks.items() if word == rank), -1)
            if self.ranks
            else int(rank)
        )


def utter(act: Act, counts: Vector, language: Language, rng: random.Random, *, told: bool, left: bool) -> str:
    """The act in words. `told`, `left`: the other side has stated its values, has just walked away."""

    words = phrases("deal")

    def pick(kind: str, among: int | None = None) -> str:
        return rng.choice(words[kind][:among])

    def name(k: int) -> str:
        return language.name(language.items[k], counts[k])

    said: list[str] = []
    if act.accept or act.confirm:
        said.append(pick("agree" if act.accept else "confirm"))
    if act.refuse and act.want is not None:
        said.append(pick("reason").format(name(act.want)))
    elif act.refuse:
        many_parts = act.take is not None and _splits(act.take, counts) > 1
        said.append(pick("refuse", TERSE if many_parts else None))
    if act.reveal is not None and act.against is None:
        form = pick("also" if told and rng.random() < 0.6 else "reveal")
        said.append(form.format(_values(act.reveal, language, rng)))
    if act.want is not None and not act.refuse:
        said.append(pick("want").format(name(act.want)))
    if act.spare is not None:
        said.append(pick("spare").format(name(act.spare)))
    if act.take is not None:
        said.append(_offer(act, act.take, counts, language, rng))
    if act.ask:
        said.append(pick("ask"))
    if act.leave:
        said.append(pick("bye" if left else "leave"))
    if act.close:
        said += [CLOSE] if said else [pick("hurry"), CLOSE]
    return " ".join(said)


def _values(values: Vector, language: Language, rng: random.Random) -> str:
    article, verb = rng.choice(language.frames)
    first, *others = zip(language.items, map(language.rank, values), strict=False)
    stated = [f"{article}{item} {rank}" for item, rank in others]
    return " , ".join([f"{article}{first[0]} {verb}{first[1]}", *stated])


def _offer(act: Act, take: Vector, counts: Vector, language: Language, rng: random.Random) -> str:
    words, items = phrases("deal"), language.items[: len(counts)]
    if act.reveal is not None and act.against is not None:
        mine, theirs = map(language.rank, act.reveal), map(language.rank, act.against)
        compared = zip(items, mine, theirs, take, counts, strict=True)
        return rng.choice(words["compare"]).format(" , ".join(_compared(*item) for item in compared))
    exact = rng.random() < 0.75
    if rng.random() < 0.75:
        parts = (_part(t, c, item, language, exact) for t, c, item in zip(take, counts, items, strict=True))
        forms = words["joint"] if act.best else words["by_item"]
        if not act.best and _splits(take, counts) > 1:
            forms = forms[:1]
        return rng.choice(forms).format(" , ".join(parts))
    shares = []
    for share in (take, less(counts, take)):
        named = zip(share, counts, items, strict=True)
        shares.append([_amount(n, c, item, language, exact) for n, c, item in named if n] or ["nothing"])
    form = rng.choice(words["offer"][:TERSE] if sum(map(len, shares)) > 4 else words["offer"])
    return form.format(*(" and ".join(share) for share in shares))


def _splits(take: Vector, counts: Vector) -> int:
    """How many types are divided."""
    return sum(0 < t < c for t, c in zip(take, counts, strict=True))


def _compared(item: str, mine: str, yours: str, n: int, count: int) -> str:
    """What one is worth to both sides, and who gets it: "hat 2 to 1 for me", or divided "hat 1 to 1 , 2 for
    me and 1 for you".
    """
    return f"{item} {mine} to {yours} {f', {n} ' if 0 < n < count else ''}{_whose(n, count)}"


def _part(n: int, count: int, item: str, language: Language, exact: bool) -> str:
    """Who gets how many of one type: "2 hats for me and 1 for you"."""
    return f"{_amount(n or count, count, item, language, exact)} {_whose(n, count)}"


def _whose(n: int, count: int) -> str:
    if 0 < n < count:
        return f"for me and {count - n} for you"
    return "for me" if n else "for you"


def _amount(n: int, count: int, item: str, language: Language, exact: bool) -> str:
    """`n` of `count` items: "2 hats", or, when it is all of them and not `exact`, "both hats"."""
    whole = "" if exact or n < count else {1: "the", 2: "both"}.get(n, f"all {n}")
    return f"{whole or n} {language.name(item, n)}"


# ---- reading -----------------------------------------------------------------------------------------------

WRITTEN = ("also", "reveal", "joint", "offer", "compare", "by_item", "reason", "want", "spare")
# A kind that can begin like one before it comes after it.
KINDS = (*WRITTEN, "leave", "bye", "agree", "hurry", "confirm", "refuse", "ask")
NUMBER = "(?:0|[1-9][0-9]{0,3})"


def understood(text: str, counts: Vector, language: Language) -> Act:
    """The act that an utterance says, as far as it is understood: values and offers only when they are
    complete, and offers when they divide just what there is.
    """
    names = language.items[: len(counts)]
    parts = []
    for kind, slots in _forms(
        names, language.plural, tuple(language.ranks.values()), language.frames
    ).clauses(plain(text)):
        if kind in SIMPLE:
            parts.append(SIMPLE[kind])
        elif kind in ("reveal", "also"):
            parts.append(
                Act(reveal=tuple(language.value(rank.split()[-1]) for rank in slots[0].split(" , ")))
            )
        elif kind in ("want", "spare", "reason"):
            k = names.index(slots[0].removesuffix(language.plural))
            parts.append(Act(spare=k) if kind == "spare" else Act(want=k, refuse=kind == "reason"))
        elif kind == "compare":
            parts.append(_read_compared(slots[0], counts, language))
        else:
            take = _read_offer(kind, slots, counts, language)
            parts += [] if take is None else [Act(take=take, best=kind == "joint")]
    return merged(parts, text.endswith(CLOSE))


@cache
def _forms(
    names: tuple[str, ...], plural: str, ranks: tuple[str, ...], frames: tuple[tuple[str, str], ...]
) -> Forms:
    rank = "|".join(ranks) if ranks else NUMBER
    rank = f"(?:{rank})"
    item = f"(?:{'|'.join(names)})(?:{plural})?"
    amount = f"(?:the|both|(?:all )?{NUMBER}) {item}"
    share = f"(?:nothing|{amount}(?: and {amount})*)"
    halves = f"for me and {NUMBER} for you"
    part = f"{amount} (?:{halves}|for me|for you)"
    values = "|".join(
        " , ".join(f"{article}{name} {'' if k else verb}{rank}" for k, name in enumerate(names))
        for article, verb in dict.fromkeys(frames)
    )
    compared = " , ".join(f"{name} {rank} to {rank} (?:, {NUMBER} {halves}|for me|for you)" for name in names)
    by_item = " , ".join([part] * len(names))
    slots = {
        "reveal": (values,),
        "also": (values,),
        "offer": (share, share),
        "joint": (by_item,),
        "by_item": (by_item,),
        "compare": (compared,),
        **dict.fromkeys(("want", "spare", "reason"), (item,)),
    }
    forms = {kind: phrases("deal")[kind] for kind in KINDS}
    forms["reveal"] = [*forms["reveal"], "{0} ."]  # values alone are the speaker's
    return Forms(forms, slots)


def _read_offer(kind: str, slots: Sequence[str], counts: Vector, language: Language) -> Vector | None:
    """What the speaker would take, None where the parts do not add up to what there is."""
    mine, yours = [0] * len(counts), [0] * len(counts)
    if kind == "offer":
        for share, words in zip((mine, yours), slots, strict=True):
            for amount in () if words == "nothing" else words.split(" and "):
                n, k = _read_amount(amount, language)
                share[k] += n
    else:
        for part in slots[0].split(" , "):
            amount, _, whose = part.partition(" for ")
            n, k = _read_amount(amount, language)
            (mine if whose.startswith("me") else yours)[k] += n
            if whose.startswith("me and"):
                yours[k] += int(whose.split()[2])
    return tuple(mine) if less(counts, tuple(mine)) == tuple(yours) else None


def _read_amount(words: str, language: Language) -> tuple[int, int]:
    """How many items of which type: "all 3 hats"."""
    *many, item = words.split()
    n = {"the": 1, "both": 2}.get(many[0]) or int(many[-1])
    return n, language.items.index(item.removesuffix(language.plural))


def _read_compared(words: str, counts: Vector, language: Language) -> Act:
    """Both values of each type, and who gets it; the values alone where the division does not add up."""
    rows = re.findall(r"(\w+) (\w+) to (\w+) (?:, (\d+) )?for (me|you)(?: and (\d+) for you)?", words)
    mine, theirs = (tuple(language.value(row[column]) for row in rows) for column in (1, 2))
    act = Act(reveal=mine, against=theirs)
    take = tuple(
        int(row[3] or (count if row[4] == "me" else 0)) for row, count in zip(rows, counts, strict=True)
    )
    left = tuple(
        int(row[5] or (count if row[4] == "you" else 0)) for row, count in zip(rows, counts, strict=True)
    )
    return replace(act, take=take, best=True) if less(counts, take) == left else act
