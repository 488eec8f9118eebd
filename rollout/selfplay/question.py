"""What a protocol asks the judge, and how long it waited."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from duologue.rollout.games.game import Persona
from duologue.rollout.judge.questions import Case
from duologue.rollout.selfplay.dialogue import Asked, Turn


@dataclass(kw_only=True, slots=True, eq=False)
class Question:
    """What a protocol waits for from the judge. It is answered with the judge's answer, or None where there
    is none.
    """

    kind: str
    case: Case
    turns: int  # that were said so far
    begun: float = field(default_factory=time.monotonic)

    def asked(self, answer: dict[str, Any] | None) -> Asked:
        """With its answer, now."""
        seconds = time.monotonic() - self.begun
        return Asked(kind=self.kind, turns=self.turns, answer=answer, seconds=seconds)


def case_of(
    dilemma: str, personas: tuple[Persona, ...], turns: Sequence[Turn], unfinished: bool = False
) -> Case:
    """What is judged after these turns: the final statements, or the talk itself where it is `unfinished`."""
    completion = "".join(turn.text for turn in turns if turn.kind == "final")
    if unfinished:
        completion = "\n\n".join(f"{personas[turn.role].name}: {turn.text}" for turn in turns)
    return Case(
        dilemma=dilemma,
        personas=personas,
        turns=tuple((turn.role, turn.text) for turn in turns if turn.kind != "final"),
        completion=completion,
    )
