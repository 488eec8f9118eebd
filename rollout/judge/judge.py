"""The two judges: a game's own rules, and AI feedback, which asks a back end, whose answers go through the ledger.

judge.submit(AGREEMENT, case, tag)               # returns at once; the arena goes on with other dialogues
for tag, answer in judge.answered(wait=False):   # what has arrived since; None: no valid answer, so unscored
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from duologue.rollout.games.game import Game
from duologue.rollout.judge.ledger import Ledger, ledger_key
from duologue.rollout.judge.questions import AGREEMENT, Case, Prompt, read_answer
from duologue.rollout.selfplay.dialogue import Dialogue

UNSCORED = "unscored"
RETRY_TEMPERATURE = 0.7  # of a question asked again: a greedy judge would repeat an invalid answer
Answer = dict[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One question for a back end. `check` raises ValueError for an invalid answer, which is then asked for again.

    `done` is called once, from any thread, with a checked answer or None, and the reason of a None.
    """

    kind: str
    text: str
    check: Callable[[str], Any]
    done: Callable[[str | None, str], None]


class Backend(Protocol):
    """Answers questions. `name` and `settings` are what an answer depends on; they are part of its address in the ledger."""

    settings: dict[str, object]

    @property
    def name(self) -> str: ...

    def ask(self, question: Ask) -> None:
        """Begin to answer; returns at once."""
        ...

    def work(self) -> bool:
        """Do a part of the work in the caller's thread; False when it is done elsewhere."""
        ...

    def close(self) -> None: ...


class RuleJudge:
    """The judge of a verifiable game: its own rules. Nothing is asked, so nothing is ever unscored."""

    def __init__(self, game: Game) -> None:
        self.game = game

    def settle(self, dialogues: Sequence[Dialogue]) -> dict[str, float]:
        """Give every dialogue that has ended its reward, None when it is unscored; returns metrics since the last call."""
        for dialogue in dialogues:
            if dialogue.outcome is not None:  # else an opponent's server gave no answer
                dialogue.reward = self.game.rewards(dialogue.scenario, dialogue.outcome)
        return {}

    def close(self) -> None:
        return


class FeedbackJudge:
    """Agreement judge and scorer of dialogues, on one back end. `offline` asks nobody: all comes from the ledger."""

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger,
        prompts: dict[str, Prompt],
        *,
        show_dialogue: bool = False,
        max_unscored_share: float = 0.1,
        offline: bool = False,
    ) -> None:
        self.backend, self.ledger, self.prompts = backend, ledger, prompts
        self.show_dialogue, self.offline = show_dialogue, offline
        self.max_unscored_share = max_unscored_share
        self.last_fault = ""
        self._waiting: dict[
            str, list[tuple[Any, str, Case, float]]
        ] = {}  # by key: tag, kind, case, when it was asked
        self._arrived: queue.SimpleQueue[tuple[str, str | None, str]] = queue.SimpleQueue()
        self._known: list[tuple[Any, Answer]] = []  # answered by the ledger, not yet taken
        self._forget_costs()

    def _forget_costs(self) -> None:
        self.asked = self.hits = self.failed = 0
        self.answer_seconds = self.wait_seconds = 0.0

    def submit(self, kind: str, case: Case, tag: Any) -> None:
        """Ask about `case`. The same question in flight twice is asked once."""
        prompt = self.prompts[kind]
        text = prompt.fill(case, self.show_dialogue or kind == AGREEMENT)
        key = ledger_key(self.backend.name, prompt.version, self.backend.settings, text)
        content = self.ledger.get(key)
        with contextlib.suppress(ValueError):  # kept under older rules
            if content is not None:
                self._known.append((tag, read_answer(kind, content, case)))
                self.hits += 1
                return
        waiting = self._waiting.setdefault(key, [])
        waiting.append((tag, kind, case, time.monotonic()))
        if len(waiting) > 1:
            self.hits += 1
            return
        if self.offline:
            self._arrived.put(
                (key, None, f"an answer is not in {self.ledger.path}, and judge.offline = true asks nobody")
            )
            return
        self.asked += 1

        def done(
            content: str | None, reason: str
        ) -> None:  # in the back end's thread: kept before anybody hears of it
            try:
                if content is not None:
                    self.ledger.put(key, kind, self.backend.name, prompt.version, content)
            except (OSError, ValueError) as error:  # ValueError: not text that can be written
                content, reason = None, str(error)
            self._arrived.put((key, content, reason))

        self.backend.ask(
            Ask(kind=kind, text=text, check=lambda content: read_answer(kind, content, case), done=done)
        )

    def answered(self, wait: bool) -> list[tuple[Any, Answer]]:
        """(tag, answer) of all that has arrived; with `wait` at least one, if anything is open."""
        began = time.monotonic()
        found, self._known = self._known, []
        while True:
            works = bool(self._waiting) and self.backend.work()
            with contextlib.suppress(queue.Empty):
                while True:
                    block = wait and not found and bool(self._waiting) and not works
                    key, content, reason = self._arrived.get(block)
                    self.last_fault = reason or self.last_fault
                    self.failed += content is None
                    for tag, kind, case, since in self._waiting.pop(key):
                        found.append((tag, None if content is None else read_answer(kind, content, case)))
                        self.answer_seconds += time.monotonic() - since
            if found or not (wait and self._waiting):
                self.wait_seconds += time.monotonic() - began if wait else 0.0
                return found

    def check_share(self, unscored: int, total: int) -> None:
        """RuntimeError when more of `total` dialogues are unscored than is accepted, as soon as that is certain."""
        if unscored > self.max_unscored_share * total:
            raise RuntimeError(
                f"the judge failed: {unscored} of {total} dialogues are unscored, above judge.max_unscored_share = "
                f"{self.max_unscored_share:g}; the last reason: {self.last_fault}. --resume goes on from the last checkpoint and asks "
                "nothing again that was answered"
            )

    def settle(self, dialogues: Sequence[Dialogue]) -> dict[str, float]:
        for dialogue in dialogues:
            assert dialogue.outcome is not None
            dialogue.reward = None if dialogue.outcome.failure == UNSCORED else dialogue.outcome.scores
        metrics = {
            "judge_asked": float(self.asked),
            "judge_hits": float(self.hits),
            "judge_failed": float(self.failed),
            "judge_seconds": self.answer_seconds / max(self.asked, 1),  # of a question, from submit to answer
            "judge_wait_seconds": self.wait_seconds,  # with nothing else to do
        }
        self._forget_costs()
        return metrics

    def close(self) -> None:
        self.backend.close()
        self.ledger.close()
