"""Reads what the forms of utterances in a game's file of words can say: every form is a pattern, with the
slots that its speaker fills. What writes and what reads an utterance are made of the same file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from duologue.rollout.games.scripted import Act
from duologue.rollout.games.selection import CLOSE

Clause = tuple[
    str, tuple[str, ...]
]  # the kind of a form, and what stood in its slots in the order of {0}, {1}
SLOT = re.compile(r"\{(\d)\}")
ENDS = (".", "?")  # of a sentence
ByWord = dict[str, re.Pattern[str]]
MARKS = {",": " , ", ";": " , ", ".": " . ", "!": " . ", "?": " ? ", ":": " : "}


class Forms:
    """The clauses of an utterance. `forms` are those of each kind, `slots` the patterns of what fills {0},
    {1}, ... in a form of a kind.

    A form is looked for where a sentence begins, first those that begin with that word, then those that
    begin with a slot; one with slots also after other words, since a policy forgets some. The kinds come in
    the order in which they are tried, which decides where one form begins like another: the longer kind
    first.
    """

    def __init__(self, forms: Mapping[str, Sequence[str]], slots: Mapping[str, Sequence[str]]) -> None:
        self._kinds: list[str] = []
        self._names: list[list[str]] = []  # of a form's slots in the order of their numbers
        slotted: dict[str, list[str]] = defaultdict(list)  # patterns by a form's first word, "": a slot
        every: dict[str, list[str]] = defaultdict(list)
        for kind, written in forms.items():
            for form in written:
                pattern = self._pattern(kind, form, slots.get(kind, ()))
                word = "" if form[0] == "{" else form.split()[0]
                every[word].append(pattern)
                if SLOT.search(form):
                    slotted[word].append(pattern)
        self._first, self._anywhere = (
            {word: re.compile("|".join(patterns)) for word, patterns in found.items()}
            for found in (every, slotted)
        )

    def _pattern(self, kind: str, form: str, slots: Sequence[str]) -> str:
        n = len(self._kinds)
        literal = [re.escape(part) for part in SLOT.split(form)[::2]]
        numbers = [int(number) for number in SLOT.findall(form)]
        filled = [f"(?P<s{n}_{number}>{slots[number]})" for number in numbers]
        self._kinds.append(kind)
        self._names.append([f"s{n}_{number}" for number in sorted(numbers)])
        words = "".join(part for pair in zip(literal, [*filled, ""], strict=True) for part in pair)
        return rf"(?P<f{n}>{words})(?!\S)"

    def clauses(self, text: str) -> Iterator[Clause]:
        """What is understood of `text`, in its order; other words are skipped."""
        at, tried = 0, self._first
        while at < len(text):
            end = text.find(" ", at)
            word = text[at : len(text) if end < 0 else end]
            match = _match(tried, word, text, at) or _match(tried, "", text, at)
            if match is None:
                at += len(word) + 1
                tried = self._first if word in ENDS else self._anywhere
                continue
            assert match.lastgroup is not None
            form = int(match.lastgroup[1:])  # the group that closes last is the form's, around its slots
            yield self._kinds[form], tuple(match[name] for name in self._names[form])
            at, tried = match.end() + 1, self._first


def _match(patterns: ByWord, word: str, text: str, at: int) -> re.Match[str] | None:
    pattern = patterns.get(word)
    return pattern and pattern.match(text, at)


def plain(text: str) -> str:
    """In the spelling of the forms: lower case, a space before and after each mark, no close."""
    words = text.removesuffix(CLOSE).lower()
    for mark, spaced in MARKS.items():
        words = words.replace(mark, spaced)
    return " ".join(words.split())


def merged(parts: Sequence[Act], close: bool, repeats: bool = False) -> Act:
    """One act of all clauses. Of two that say different things of one matter the later counts; who offers or
    refuses does not accept, unless an acceptance `repeats` what it accepts.
    """
    said: dict[str, Any] = {"close": close}
    for part in parts:
        for name in NAMES:
            value = getattr(part, name)
            if value is not None and value is not False:
                said[name] = value
    act = Act(**said)
    if act.against is not None and (act.take is None or act.reveal is None):
        act = replace(act, against=None)
    if act.take is not None or act.refuse or act.leave:
        accept = repeats and act.accept and not (act.refuse or act.leave)
        act = replace(act, accept=accept, confirm=False)
    return act


NAMES = tuple(Act.__slots__)
SIMPLE = {
    "agree": Act(accept=True),
    "confirm": Act(confirm=True),
    "refuse": Act(refuse=True),
    "ask": Act(ask=True),
    "leave": Act(leave=True),
    "bye": Act(leave=True),
    "hurry": Act(),  # what it means is in the close
}  # of kinds without slots
