"""Reads what the forms of utterances in a game's file of words can say: every form is a pattern, with the
slots that its speaker fills. What writes and what reads an utterance are made of the same file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from duologue.rollout.games.scripted import START, Act
from duologue.rollout.games.selection import CLOSE

Clause = tuple[
    str, tuple[str, ...]
]  # the kind of a form, and what stood in its slots in the order of {0}, {1}
SLOT = re.compile(r"\{(\d)\}")
SENTENCE = re.compile(r"[^.?]*[.?]?\s*")
MARK = re.compile(r"\s*([,.?:])\s*")


class Forms:
    """The clauses of an utterance. `forms` are those of each kind, `slots` the patterns of what fills {0},
    {1}, ... in a form of a kind.

    A form is looked for where a sentence begins. The kinds come in the order in which they are tried, which
    decides where one form begins like another: the longer kind first.
    """

    def __init__(self, forms: Mapping[str, Sequence[str]], slots: Mapping[str, Sequence[str]]) -> None:
        self._kinds: list[str] = []
        self._names: list[list[str]] = []  # of a form's slots in the order of their numbers
        patterns = []
        for kind, written in forms.items():
            for form in written:
                patterns.append(self._pattern(kind, form, slots.get(kind, ())))
        self._any = re.compile("|".join(patterns))

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
        """What is understood of `text`, in its order; a sentence of no form is skipped."""
        at = 0
        while at < len(text):
            match = self._any.match(text, at)
            if match is None:
                skipped = SENTENCE.match(text, at)
                at = max(at + 1, skipped.end() if skipped else 0)
                continue
            assert match.lastgroup is not None
            form = int(match.lastgroup[1:])  # the group that closes last is the form's, around its slots
            yield self._kinds[form], tuple(match[name] for name in self._names[form])
            at = match.end() + 1


def plain(text: str) -> str:
    """In the spelling of the forms: lower case, a space before and after each mark, no close."""
    words = text.removesuffix(CLOSE).lower().replace("!", ".").replace(";", ",")
    return " ".join(MARK.sub(r" \1 ", words).split())


def merged(parts: Sequence[Act], close: bool) -> Act:
    """One act of all clauses. Of two that say different things of one matter the later counts; who offers or
    refuses does not accept.
    """
    said: dict[str, object] = {}
    for part in parts:
        said |= {name: getattr(part, name) for name in Act.__slots__ if getattr(part, name) != DEFAULTS[name]}
    act = replace(START, **said, close=close)  # type: ignore[arg-type]
    if act.against is not None and (act.take is None or act.reveal is None):
        act = replace(act, against=None)
    if act.take is not None or act.refuse or act.leave:
        act = replace(act, accept=False, confirm=False)
    return act


DEFAULTS = {name: getattr(START, name) for name in Act.__slots__}
SIMPLE = {
    "agree": Act(accept=True),
    "confirm": Act(confirm=True),
    "refuse": Act(refuse=True),
    "ask": Act(ask=True),
    "leave": Act(leave=True),
    "bye": Act(leave=True),
    "hurry": Act(),  # what it means is in the close
}  # of kinds without slots
