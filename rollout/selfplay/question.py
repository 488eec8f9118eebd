"""What a protocol asks the judge, and how long it waited."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from duologue.rollout.judge.questions import Case
from duologue.rollout.selfplay.dialogue import Asked


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
