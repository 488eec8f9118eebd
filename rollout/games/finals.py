"""Final statements as people write them, brought to the form that a game's rules read; what has no reading,
or two, is malformed and counted by its kind.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import replace

from duologue.rollout.games.english import CLOSED, DONE, LEFT, closes, normal
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.games.selection import WALK_AWAY, SelectionGame

KINDS = {
    "incomplete": "a final statement did not name everything",
    "ambiguous": "a final statement said two things",
}
LEAVES = re.compile(r"(?:i|id|ill)?(?: (?:will|would))? ?walk(?:ing)? away|im walking away")
START = re.compile(r"^(?:my )?final(?: (?:statement|answer|selection))?(?: is)? ")
LONGEST = 400  # characters of a statement that is read
# A number that is not a plain whole one, and words and digits that the normal spelling would leave out
GUESSED = re.compile(
    r"[-−–]\d|(?:^|:|\bis)\s*[-−–]\s*\d|[<>≤≥~≈]\s*\d"
    r"|\d\s*[+%/]|[½¼¾²³⅓⅔]|(?![\x00-\x7f])\w"
)


class Unread(ValueError):
    """A final statement without one reading; its text is the kind."""


class ReadFinals(SelectionGame):
    """What a game gains when it is told in English; it stands before the game among the bases."""

    close = DONE
    left = LEFT

    @abstractmethod
    def read(self, words: str) -> str:
        """The plain statement of these words, which are in their normal spelling, or `Unread`."""

    def closes(self, text: str) -> bool:
        return closes(text)

    def plain_final(self, text: str) -> str:
        """A final statement in the plain telling; `Unread` with the kind where it has not one reading."""
        spelled = normal(CLOSED.sub("", text[:LONGEST]))
        words = START.sub("", " ".join(spelled.rstrip(" .!").split()))
        if len(text) > LONGEST or re.search("[.?!{}]", words) or GUESSED.search(text):
            raise Unread("malformed")
        return WALK_AWAY if LEAVES.fullmatch(words) else self.read(words)

    def judge(self, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
        if finals is None:
            return super().judge(scenario, None)  # type: ignore[safe-super]
        read, kinds = [], []
        for text in finals:
            try:
                read.append(self.plain_final(text))
            except Unread as error:
                read.append("")
                kinds.append(str(error))
        outcome = super().judge(scenario, (read[0], read[1]))  # type: ignore[safe-super]
        return replace(outcome, failure=kinds[0]) if outcome.failure == "malformed" and kinds else outcome

    def can_state(self, scenario: Scenario, text: str) -> bool:
        return super().can_state(scenario, text) and self.judge(scenario, (text, text)).failure not in KINDS
