"""English as scripted negotiators write and read it: the forms of a file of words are both what is said and
the patterns by which it is understood.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

from duologue.rollout.games.forms import SIMPLE, merged
from duologue.rollout.games.scripted import Act, Side, phrases
from duologue.rollout.games.template import fill, load_template

DONE = "[done]"  # ends an utterance that closes the talk
LEFT = "I walk away."  # in place of a final statement
CLOSED = re.compile(r"\[done\][\s.!?*\"']*$", re.IGNORECASE)
PROMPTS = Path(__file__).parent / "prompts"
UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
UNITS += [
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENTHS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
TENS = {word: 10 * n for n, word in enumerate(TENTHS, 2)}
WORDS = {word: str(n) for n, word in enumerate(UNITS)} | {word: str(n) for word, n in TENS.items()}
SHORT = {
    "i would": "id", "i will": "ill", "you would": "youd", "you will": "youll", "do not": "dont",
    "can not": "cant", "cannot": "cant", "that is": "thats", "it is": "its", "i am": "im", "let us": "lets",
    "we are": "were", "i have": "ive", "we have": "weve", "does not": "doesnt", "is not": "isnt",
}  # fmt: skip
SHORTER = re.compile(rf"\b(?:{'|'.join(SHORT)})\b")
COMPOUND = re.compile(rf"\b({'|'.join(TENS)})[- ]({'|'.join(UNITS[1:10])})\b")
SHARED = ("again", "leave", "bye", "agree", "confirm", "hurry")
YES = re.compile(
    r"(?:ok|okay|yes|yeah|deal|agreed|great|sure|fine|perfect|sounds (?:good|great|fair)|"
    r"(?:i|ill|i can|im happy to) (?:accept|agree)|"
    r"(?:you have|weve) a deal|that works|its a deal|works for me)\b"
)
NOT_YES = re.compile(
    r"\b(?:but|not|no|if|cant|unless|except|instead|only|when|how|what|about|first|question|"
    r"(?:do|is|are|was|were|wo|would|could|should|has|have|had|did|must|need|ai)(?:es)?nt|"
    r"let me|think|please|tell|need|want|(?:id|would) (?:like|love|prefer|rather))\b|\d"
)
NO = re.compile(r"(?:no|nope|sorry|never|i cant|i dont|i wont|thats (?:too|not))\b")
QUESTION = re.compile(r"\b(?:what|how|which|tell|where)\b.*\b(?:you|your|yours)\b|^(?:and )?you$")
AWAY = re.compile(r"\b(?:no deal|walk away|im out|goodbye)\b")


class Words(Protocol):
    """What a game that is told in English lets its scripted negotiators say and hear."""

    def utter(self, side: Side, act: Act) -> str: ...
    def understood(self, side: Side, text: str) -> Act: ...


def fill_prompt(name: str, places: dict[str, str]) -> str:
    """The package's prompt of that name."""
    return fill(_template(name, frozenset(places)), places)


@cache
def _template(name: str, places: frozenset[str]) -> str:
    return load_template("", PROMPTS, name, {*places}, {*places}).strip()


def closes(text: str) -> bool:
    return CLOSED.search(text) is not None


def normal(text: str) -> str:
    """In lower case, without marks inside a sentence and with numbers in digits; contractions have one
    spelling.
    """
    words = text.lower().replace("’", "'").replace("'", "")
    words = re.sub(r"[^a-z0-9.?!{}\s-]", " ", words)
    words = COMPOUND.sub(lambda m: str(TENS[m[1]] + UNITS.index(m[2])), words).replace("-", " ")
    words = " ".join(WORDS.get(word, word) for word in re.findall(r"[^\s.?!]+|[.?!]", words))
    return SHORTER.sub(lambda match: SHORT[match[0]], words)


def sentences(text: str) -> Iterator[tuple[str, bool]]:
    """Each in its normal spelling without its mark, and whether it asks."""
    for words, mark in re.findall(r"([^.?!]+)([.?!]?)", normal(CLOSED.sub("", text))):
        if words.strip():
            yield words.strip(), mark == "?"


@cache
def words_of(names: tuple[str, ...]) -> Mapping[str, Sequence[str]]:
    """The forms of these files by kind, without marks; a later file's take the place of an earlier one's."""
    every = {kind: forms for name in names for kind, forms in phrases(name).items()}
    return {kind: [form.replace("*", "") for form in forms] for kind, forms in every.items()}


@cache
def _marked(names: tuple[str, ...]) -> re.Pattern[str]:
    """Any form with a mark, whose group is what stands *between stars*; a form has one."""
    forms = sorted(
        form for name in names for every in phrases(name).values() for form in every if "*" in form
    )
    literal = "|".join(re.sub(r"\\\*(.*)\\\*", r"(\1)", re.escape(form)) for form in forms)
    return re.compile(re.sub(r"\\\{\d\\\}", r"\\S+?", literal), re.IGNORECASE)


def decisive(names: tuple[str, ...], text: str) -> list[tuple[int, int]]:
    """Where the marked words of these files' forms begin and end in what `pick` made of them."""
    return [match.span(match.lastindex or 0) for match in _marked(names).finditer(text)]


@cache
def patterns(
    names: tuple[str, ...], kinds: tuple[str, ...]
) -> list[tuple[str, tuple[int, ...], re.Pattern[str]]]:
    """(kind, the numbers of its slots in their order, what a sentence of that form is); those with most words
    of their own come first.
    """
    found = []
    for kind in kinds:
        for form in words_of(names)[kind]:
            spelled = normal(form).rstrip(" .?!")
            slots = tuple(int(n) for n in re.findall(r"\{(\d)\}", spelled))
            literal = re.sub(r"\\\{\d\\\}", "(.+?)", re.escape(spelled))
            found.append((kind, slots, re.compile(literal)))
    return sorted(found, key=lambda one: -len(one[2].pattern))


def matches(
    sentence: str, names: tuple[str, ...], kinds: tuple[str, ...]
) -> Iterator[tuple[str, dict[int, str]]]:
    """The forms that a sentence can be of, with what stands in their slots."""
    for kind, slots, pattern in patterns(names, kinds):
        if match := pattern.fullmatch(sentence):
            yield kind, dict(zip(slots, match.groups(), strict=True))


def pick(words: Mapping[str, Sequence[str]], kind: str, rng: random.Random, *fill: str) -> str:
    """A form of the kind with its slots filled, beginning with a capital."""
    said = rng.choice(words[kind]).format(*fill)
    return said[0].upper() + said[1:]


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def small_talk(sentence: str, asks: bool) -> Act | None:
    """What a sentence of nobody's form says without numbers or items, None where that is not clear."""
    if asks:
        return Act(ask=True) if QUESTION.search(sentence) else None
    if AWAY.search(sentence):
        return Act(leave=True)
    if NO.match(sentence):
        return Act(refuse=True)
    return Act(accept=True) if YES.match(sentence) and not NOT_YES.search(sentence) else None


def simple(kind: str) -> Act:
    """Of a kind without slots; what was not understood is asked for."""
    return Act(ask=True) if kind == "again" else SIMPLE[kind]


def together(parts: Sequence[Act], text: str) -> Act:
    """Of an acceptance that names an offer the listener knows whether it is the one that it made."""
    return merged(parts, closes(text), repeats=True)
