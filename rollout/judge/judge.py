"""AI feedback: asks a back end whether two agree, what a resolution is worth, which of two answers is better.

judge.submit(AGREEMENT, case, tag)               # returns at once; the arena goes on with other dialogues
for tag, answer in judge.answered(wait=False):   # what has come since; None: no valid answer, so unscored
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from duologue.rollout.judge.asking import Asking, Backend, Fallible
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.questions import AGREEMENT, Case, Posed, Prompt, read_answer

Answer = dict[str, Any] | None


class Judge(Fallible, Protocol):
    """Answers the questions of protocols."""

    def submit(self, kind: str, case: Case, tag: Any) -> None:
        """Begin to ask about `case`."""
        ...

    def answered(self, wait: bool) -> list[tuple[Any, Answer]]:
        """(tag, answer) of all that has come; with `wait` at least one, if anything is open."""
        ...


class FeedbackJudge(Asking):
    """Agreement judge and scorer of dialogues, on one back end. `offline` asks nobody: all comes from the
    ledger. `held`: the back end chooses by probability (see `read_answer`).
    """

    who = "the judge"

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger,
        prompts: dict[str, Prompt],
        *,
        show_dialogue: bool = False,
        max_unscored_share: float = 0.1,
        offline: bool = False,
        held: bool = False,
    ) -> None:
        super().__init__(backend, ledger, offline)
        self.prompts, self.show_dialogue = prompts, show_dialogue
        self.max_unscored_share, self.held = max_unscored_share, held
        self._wait_seconds = 0.0

    def submit(self, kind: str, case: Case, tag: Any) -> None:
        """Ask about `case`. The same question in flight twice is asked once."""
        prompt = self.prompts[kind]
        posed = Posed(prompt=prompt, case=case, show_dialogue=self.show_dialogue or kind == AGREEMENT)

        def read(content: str) -> dict[str, Any]:
            return read_answer(kind, content, case, self.held)

        self.begin(tag, kind=kind, version=prompt.version, text=posed.text(), read=read, posed=posed)

    def answered(self, wait: bool) -> list[tuple[Any, Answer]]:
        """(tag, answer) of all that has arrived; with `wait` at least one, if anything is open."""
        if not wait:
            return self.answers()
        began = time.monotonic()
        answers = self.answers(None)
        self._wait_seconds += time.monotonic() - began
        return answers

    def costs(self) -> dict[str, float]:
        """Metrics of what was asked since the last call."""
        costs = {
            "judge_asked": float(self.asked),
            "judge_hits": float(self.hits),
            "judge_failed": float(self.failed),
            "judge_seconds": self.answer_seconds / max(self.asked, 1),  # of a question, from submit to answer
            "judge_wait_seconds": self._wait_seconds,  # with nothing else to do
            **self.backend.costs(),
        }
        self.forget_counts()
        self._wait_seconds = 0.0
        return costs
