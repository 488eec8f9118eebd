"""What a scripted negotiator of `deal` can mean, and how it says it.

An `Act` is an utterance before it is words; it holds all that the other side learns from it. Offers say who gets how
many of each type, in clauses of one shape ("i take 2 hats"), so that final statements can be copied from them. An offer
that is best for both sets the two values of an item side by side before it says who gets it: a model of a million
parameters learns to compare numbers that stand next to each other within minutes, and did not learn it otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from duologue.rollout.games.deal import CLOSE, Vector

REVEAL = (
    "to me {0} .",
    "my values are {0} .",
    "i will be open : {0} .",
    "honestly , for me {0} .",
    "here is how i see it : {0} .",
    "my side : {0} .",
    "so you know , my values : {0} .",
    "let us be open . {0} .",
)
ALSO = (
    "and to me {0} .",
    "fair , my values are {0} .",
    "thank you . for me {0} .",
    "i see . to me {0} .",
    "ok , mine are {0} .",
    "then you should know : {0} .",
)
WANT = (
    "i care most about the {0} .",
    "i really want the {0} .",
    "the {0} would help me most .",
    "i need the {0} most .",
    "mostly i am here for the {0} .",
    "i would love to have the {0} .",
    "i like the {0} best .",
)
SPARE = (
    "i do not need the {0} .",
    "the {0} could be yours .",
    "i have no use for the {0} .",
    "you may have the {0} .",
    "i can live without the {0} .",
    "keep the {0} if you like .",
)
ASK = (
    "what are they worth to you ?",
    "and you ?",
    "what do you value ?",
    "how about your side ?",
    "how do you see it ?",
    "tell me your values .",
    "your side , please ?",
    "your values ?",
)
OFFER = (
    "{0} .",
    "then {0} .",
    "how about {0} ?",
    "what if {0} ?",
    "my offer : {0} .",
    "i suggest {0} .",
    "could it be {0} ?",
    "let us say {0} .",
)
COMPARE = (  # of clauses like "book 4 to 1 : i take 2 books", which is worth 4 to the speaker and 1 to the other side
    "{0} .",
    "then {0} .",
    "compare . {0} .",
    "me to you . {0} .",
    "side by side . {0} .",
    "best for both . {0} .",
    "so we waste nothing . {0} .",
)
VERBS = ("take", "take", "get", "keep", "have")
REFUSE = (
    "no .",
    "sorry , no .",
    "that is too little .",
    "not like this .",
    "i need more .",
    "you ask too much .",
    "hmm , no thank you .",
    "i can not accept that .",
)
REASON = (
    "no , i need the {0} .",
    "not without the {0} .",
    "sorry , i want the {0} .",
    "but the {0} should be mine .",
    "i can not give up the {0} .",
    "no , i came for the {0} .",
)
AGREE = (
    "deal .",
    "that works for me .",
    "sounds fair , deal .",
    "ok , i accept .",
    "great , let us do that .",
    "yes , agreed .",
    "fine with me .",
    "good offer , i take it .",
)
CONFIRM = ("great .", "thank you .", "good , we are done .", "perfect .", "nice deal .", "ok then .", "glad to hear .")
HURRY = (
    "fine , let us just choose .",
    "ok , enough talk .",
    "whatever , let us finish .",
    "i have no time , let us pick .",
    "good enough , time to choose .",
    "let us get it over with .",
)
LEAVE = (
    "then there is no deal .",
    "i would rather leave it .",
    "we will not agree .",
    "forget it .",
    "this leads nowhere , bye .",
    "no deal then .",
)
BYE = ("too bad , bye .", "as you like .", "bye then .", "sorry to hear that .", "maybe next time .", "ok , no deal .")


@dataclass(frozen=True, kw_only=True, slots=True)
class Act:
    """What an utterance says. Item types are indices; `take` is what the speaker would take."""

    accept: bool = False  # of the offer that stands
    confirm: bool = False  # that the other side accepted
    refuse: bool = False
    reveal: Vector | None = None  # the speaker's exact values
    want: int | None = None
    spare: int | None = None
    take: Vector | None = None
    against: Vector | None = None  # the other's values: `take` is the best for both by these and `reveal`
    ask: bool = False
    leave: bool = False
    close: bool = False


def utter(act: Act, counts: Vector, items: Sequence[str], rng: random.Random, *, told: bool, left: bool) -> str:
    """The act in words. `told`, `left`: the other side has stated its values, has just walked away."""

    def name(k: int) -> str:
        return items[k] + "s" * (counts[k] > 1)

    said: list[str] = []
    if act.accept or act.confirm:
        said.append(rng.choice(AGREE if act.accept else CONFIRM))
    if act.refuse:
        said.append(rng.choice(REFUSE) if act.want is None else rng.choice(REASON).format(name(act.want)))
    if act.reveal is not None and act.against is None:
        said.append(rng.choice(ALSO if told and rng.random() < 0.6 else REVEAL).format(_values(act.reveal, items, rng)))
    if act.want is not None and not act.refuse:
        said.append(rng.choice(WANT).format(name(act.want)))
    if act.spare is not None:
        said.append(rng.choice(SPARE).format(name(act.spare)))
    if act.take is not None:
        said.append(_offer(act, act.take, counts, items, rng))
    if act.ask:
        said.append(rng.choice(ASK))
    if act.leave:
        said.append(rng.choice(BYE if left else LEAVE))
    if act.close:
        said += [CLOSE] if said else [rng.choice(HURRY), CLOSE]
    return " ".join(said)


def _values(values: Vector, items: Sequence[str], rng: random.Random) -> str:
    article = rng.choice(("", "", "", "a ", "each "))
    return " , ".join(f"{article}{item} {value}" for item, value in zip(items, values, strict=True))


def _offer(act: Act, take: Vector, counts: Vector, items: Sequence[str], rng: random.Random) -> str:
    verb = rng.choice(VERBS)
    mine = [f"{n} {item}{'s' * (n > 1)}" if n else "" for n, item in zip(take, items, strict=True)]
    yours = [f"{c - n} {item}{'s' * (c - n > 1)}" if n < c else "" for n, c, item in zip(take, counts, items, strict=True)]
    whole = not any(m and y for m, y in zip(mine, yours, strict=True))
    by_item = [f"i {verb} {m}" if m else f"you {verb} {y}" for m, y in zip(mine, yours, strict=True)]
    if whole and act.reveal is not None and act.against is not None:
        compared = zip(items, act.reveal, act.against, by_item, strict=True)
        return rng.choice(COMPARE).format(" , ".join(f"{item} {m} to {y} : {clause}" for item, m, y, clause in compared))
    if whole and rng.random() < 0.5:
        return rng.choice(OFFER).format(" , ".join(by_item))
    shares = (" and ".join(filter(None, share)) or "nothing" for share in (mine, yours))
    return rng.choice(OFFER).format(" , ".join(f"{who} {verb} {share}" for who, share in zip(("i", "you"), shares, strict=True)))
