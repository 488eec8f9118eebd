"""What a scripted negotiator of `deal` can mean, and how it says it.

Offers name exactly who
gets what, mostly item by item in the order of the items: what is said next to each other needs no memory and no
arithmetic across the sentence, which is what a small model learns late. For the same reason an offer that is best for
both may set the two values of each item side by side before it says who gets it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from duologue.rollout.games.common import CLOSE, Act, Vector
from duologue.rollout.games.deal import ITEMS

REVEAL = (
    "to me {0} .", "my values are {0} .", "i will be open : {0} .", "honestly , for me {0} .",
    "here is how i see it : {0} .", "my side : {0} .", "so you know , my values : {0} .", "let us be open . {0} .",
)
ALSO = (
    "and to me {0} .", "fair , my values are {0} .", "thank you . for me {0} .", "i see . to me {0} .",
    "ok , mine are {0} .", "then you should know : {0} .",
)
WANT = (
    "i care most about the {0} .", "i really want the {0} .", "the {0} would help me most .", "i need the {0} most .",
    "mostly i am here for the {0} .", "i would love to have the {0} .", "i like the {0} best .",
)
SPARE = (
    "i do not need the {0} .", "the {0} could be yours .", "i have no use for the {0} .", "you may have the {0} .",
    "i can live without the {0} .", "keep the {0} if you like .",
)
ASK = (
    "what are they worth to you ?", "and you ?", "what do you value ?", "how about your side ?",
    "how do you see it ?", "tell me your values .", "your side , please ?", "your values ?",
)
OFFER = (
    "i take {0} , you take {1} .", "i get {0} , you get {1} .", "you get {1} , i get {0} .",
    "{0} for me , {1} for you .", "how about i take {0} and you take {1} ?", "let me have {0} and you keep {1} .",
    "my offer : {0} for me , {1} for you .", "would you give me {0} and take {1} ?",
    "can we do {0} for me , {1} for you ?", "you could have {1} , and i {0} .",
)
TERSE = 4  # as many of a list's first forms go with an offer of many parts
BY_ITEM = ("{0} .", "how about {0} ?", "i suggest {0} .", "what if {0} ?", "then {0} .", "so {0} , ok ?")
JOINT = (
    "best for both : {0} .", "each gets what it likes more : {0} .", "so we waste nothing : {0} .",
    "by our values {0} .", "together we win most with {0} .", "the best is {0} .",
)
COMPARE = (  # "book 4 to 1 for me": worth 4 to me and 1 to you, so all of the type goes to me
    "{0} .", "{0} , ok ?", "compare : {0} .", "me to you : {0} .", "side by side : {0} .", "then {0} .",
)
REFUSE = (
    "no .", "sorry , no .", "that is too little .", "not like this .", "i need more .", "you ask too much .",
    "hmm , no thank you .", "i can not accept that .",
)
REASON = (
    "no , i need the {0} .", "not without the {0} .", "sorry , i want the {0} .", "but the {0} should be mine .",
    "i can not give up the {0} .", "no , i came for the {0} .",
)
AGREE = (
    "deal .", "that works for me .", "sounds fair , deal .", "ok , i accept .", "great , let us do that .",
    "yes , agreed .", "fine with me .", "good offer , i take it .",
)
CONFIRM = ("great .", "thank you .", "good , we are done .", "perfect .", "nice deal .", "ok then .", "glad to hear .")
HURRY = (
    "fine , let us just choose .", "ok , enough talk .", "whatever , let us finish .",
    "i have no time , let us pick .", "good enough , time to choose .", "let us get it over with .",
)
LEAVE = (
    "then there is no deal .", "i would rather leave it .", "we will not agree .", "forget it .",
    "this leads nowhere , bye .", "no deal then .",
)
BYE = ("too bad , bye .", "as you like .", "bye then .", "sorry to hear that .", "maybe next time .", "ok , no deal .")


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """How items and values are named. `frames` are what stands before an item and before the first value."""

    items: tuple[str, ...] = ITEMS
    plural: str = "s"
    ranks: Mapping[int, str] = field(default_factory=dict)  # words for values that are not said as numbers
    frames: tuple[tuple[str, str], ...] = (("", ""),) * 5 + (("a ", ""), ("a ", "is worth "), ("the ", "is "), ("each ", ""))

    def name(self, item: str, n: int) -> str:
        return item + self.plural * (n > 1)

    def rank(self, value: int) -> str:
        return self.ranks.get(value, str(value))


def utter(act: Act, counts: Vector, language: Language, rng: random.Random, *, told: bool, left: bool) -> str:
    """The act in words. `told`, `left`: the other side has stated its values, has just walked away."""

    def name(k: int) -> str:
        return language.name(language.items[k], counts[k])

    said: list[str] = []
    if act.accept or act.confirm:
        said.append(rng.choice(AGREE if act.accept else CONFIRM))
    if act.refuse:
        forms = REFUSE[:TERSE] if act.take is not None and _splits(act.take, counts) > 1 else REFUSE
        said.append(rng.choice(forms) if act.want is None else rng.choice(REASON).format(name(act.want)))
    if act.reveal is not None and act.against is None:
        said.append(rng.choice(ALSO if told and rng.random() < 0.6 else REVEAL).format(_values(act.reveal, language, rng)))
    if act.want is not None and not act.refuse:
        said.append(rng.choice(WANT).format(name(act.want)))
    if act.spare is not None:
        said.append(rng.choice(SPARE).format(name(act.spare)))
    if act.take is not None:
        said.append(_offer(act, act.take, counts, language, rng))
    if act.ask:
        said.append(rng.choice(ASK))
    if act.leave:
        said.append(rng.choice(BYE if left else LEAVE))
    if act.close:
        said += [CLOSE] if said else [rng.choice(HURRY), CLOSE]
    return " ".join(said)


def _values(values: Vector, language: Language, rng: random.Random) -> str:
    article, verb = rng.choice(language.frames)
    stated = [f"{article}{item} {language.rank(value)}" for item, value in zip(language.items, values, strict=False)]
    return " , ".join([f"{article}{language.items[0]} {verb}{language.rank(values[0])}", *stated[1:]])


def _offer(act: Act, take: Vector, counts: Vector, language: Language, rng: random.Random) -> str:
    items = language.items[: len(counts)]
    if act.reveal is not None and act.against is not None:
        compared = zip(items, map(language.rank, act.reveal), map(language.rank, act.against), take, counts, strict=True)
        return rng.choice(COMPARE).format(" , ".join(_compared(*each) for each in compared))
    exact = rng.random() < 0.75
    rest = tuple(c - t for c, t in zip(counts, take, strict=True))
    if rng.random() < 0.75:
        parts = (_part(t, c, item, language, exact) for t, c, item in zip(take, counts, items, strict=True))
        forms = JOINT if act.best else BY_ITEM[:1] if _splits(take, counts) > 1 else BY_ITEM
        return rng.choice(forms).format(" , ".join(parts))
    mine, yours = (
        [_amount(n, c, item, language, exact) for n, c, item in zip(share, counts, items, strict=True) if n] or ["nothing"]
        for share in (take, rest)
    )
    form = rng.choice(OFFER[:TERSE] if len(mine) + len(yours) > 4 else OFFER)
    return form.format(" and ".join(mine), " and ".join(yours))


def _splits(take: Vector, counts: Vector) -> int:
    """How many types are divided."""
    return sum(0 < t < c for t, c in zip(take, counts, strict=True))


def _compared(item: str, mine: str, yours: str, n: int, count: int) -> str:
    """What one is worth to both sides, and who gets it: "hat 2 to 1 for me", or divided "hat 1 to 1 , 2 for me and 1 for you"."""
    return f"{item} {mine} to {yours} " + (f", {n} for me and {count - n} for you" if 0 < n < count else f"for {'me' if n else 'you'}")


def _part(n: int, count: int, item: str, language: Language, exact: bool) -> str:
    """Who gets how many of one type: "2 hats for me and 1 for you"."""
    if n in (0, count):
        return f"{_amount(count, count, item, language, exact)} for {'me' if n else 'you'}"
    return f"{_amount(n, count, item, language, exact)} for me and {count - n} for you"


def _amount(n: int, count: int, item: str, language: Language, exact: bool) -> str:
    """`n` of `count` items: "2 hats", or, when it is all of them and not `exact`, "both hats"."""
    whole = "" if exact or n < count else {1: "the", 2: "both"}.get(n, f"all {n}")
    return f"{whole or n} {language.name(item, n)}"
