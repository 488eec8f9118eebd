"""The policy's words on a terminal while they are sampled, wrapped at its edge.

A word is shown once it is whole: what follows may still belong to it, or to a character of several tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import Completion
from duologue.rollout.selfplay.dialogue import UTTERANCE
from duologue.rollout.selfplay.speakers import EngineSpeaker, Speak
from rich.cells import cell_len


class Wrapped:
    """Text that comes in pieces, given to `write` in words, with line breaks that keep within `width`."""

    def __init__(self, write: Callable[[str], None], width: int) -> None:
        self._write, self._width = write, width
        self._column = self._shown = 0  # cells in this line, characters of the whole text

    def prompt(self, text: str) -> None:
        """What stands before the text."""
        self._put(text)

    def show(self, text: str, whole: bool = False) -> None:
        """`text` is all that there is so far; with `whole` nothing follows."""
        end = len(text) if whole else last_break(text)
        for word in re.findall(r"\s+|\S+", text[self._shown : end]):
            self._put(word)
        self._shown = max(self._shown, end)

    def _put(self, word: str) -> None:
        for i, line in enumerate(word.split("\n")):
            if i:
                self._line()
            for piece in _pieces(line):
                if self._column + cell_len(piece) > self._width and self._column:
                    self._line()
                    piece = piece.lstrip(" ")
                self._write(piece)
                self._column += cell_len(piece)

    def _line(self) -> None:
        self._write("\n")
        self._column = 0


def _pieces(word: str) -> list[str]:
    """What stays on one line of a word: each wide character alone, as Chinese is broken anywhere."""
    return re.findall(r"[^\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+|.", word)


def last_break(text: str) -> int:
    """Up to where words are whole: before the last run of white space, or behind the last wide character but
    one. U+FFFD at the end is a character of which tokens are missing.
    """
    text = text.rstrip("\ufffd")
    for at in range(len(text) - 1, 0, -1):
        if text[at].isspace() and not text[at - 1].isspace():
            return at
        if unicodedata.east_asian_width(text[at - 1]) in "WF":
            return at
    return 0


class Aloud(EngineSpeaker):
    """A policy whose utterances go to a new `Wrapped` of `begin` while they are sampled. `said` counts
    those that are out.
    """

    def __init__(
        self, engine: Engine, decode: Callable[[list[int]], str], begin: Callable[[], Wrapped]
    ) -> None:
        super().__init__(engine)
        self.said = 0
        self._decode, self._begin = decode, begin
        self._screens: dict[Speak, Wrapped] = {}

    def ask(self, turn: Speak) -> None:
        super().ask(turn)
        if turn.kind == UTTERANCE:
            self._screens[turn] = self._begin()

    def answered(self, wait: bool) -> list[tuple[Speak, Completion | None]]:
        answers = super().answered(wait)
        for request, turn in self._turns.items():
            if turn in self._screens:
                self._screens[turn].show(self._text(request.completion))
        for turn, completion in answers:
            if completion is not None and (screen := self._screens.pop(turn, None)) is not None:
                screen.show(self._text(completion).rstrip() + "\n", whole=True)
                self.said += 1
        return answers

    def _text(self, completion: Completion) -> str:
        return self._decode(completion.token_ids).lstrip()
