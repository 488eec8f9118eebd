"""Asking a back end: each question once, every answer kept on disk before anybody hears of it, handed out
in the caller's thread.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from duologue.rollout.judge.ledger import Ledger, ledger_key
from duologue.rollout.judge.questions import Posed

LOOK_S = 0.05  # from one look for an answer of another process to the next
RETRY_TEMPERATURE = 0.7  # at least, after an invalid answer: a greedy judge would repeat it


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question for a back end. `check` raises ValueError for an invalid answer, which is then asked for
    again.

    `done` is called once, from any thread, with a checked answer or None, and the reason of a None. `posed`
    is what `text` was made of, where a judge is asked.
    """

    kind: str
    text: str
    check: Callable[[str], Any]
    done: Callable[[str | None, str], None]
    posed: Posed | None = None


class Backend(Protocol):
    """Answers questions. `name` and `settings` are what an answer depends on; they are part of its address
    in the ledger.
    """

    settings: dict[str, Any]

    @property
    def name(self) -> str: ...

    def ask(self, question: Ask) -> None:
        """Begin to answer; returns at once."""
        ...

    def work(self) -> bool:
        """Do a part of the work in the caller's thread; False when it is done elsewhere."""
        ...

    def costs(self) -> dict[str, float]:
        """Metrics of the work here since the last call, per question."""
        ...

    def close(self) -> None: ...


class Asking:
    """Questions in flight, each under a tag of the caller's. `offline` asks nobody: all comes from the
    ledger.
    """

    def __init__(self, backend: Backend, ledger: Ledger, offline: bool = False) -> None:
        self.backend, self.ledger, self.offline = backend, ledger, offline
        self.last_fault = ""
        self._waiting: dict[str, list[tuple[Any, float]]] = {}  # by key: tag, and when it was asked
        self._arrived: queue.SimpleQueue[tuple[str, Any, str]] = queue.SimpleQueue()  # key, answer, reason
        self._elsewhere: dict[str, Callable[[str], Any]] = {}  # asked by another process
        self._known: list[tuple[Any, Any]] = []  # answered by the ledger, not yet handed out
        self.forget_counts()

    def forget_counts(self) -> None:
        self.asked = self.hits = self.failed = 0
        self.answer_seconds = 0.0  # of all questions, from `ask` to the answer

    def begin(
        self,
        tag: Any,
        *,
        kind: str,
        version: str,
        text: str,
        read: Callable[[str], Any],
        posed: Posed | None = None,
    ) -> None:
        """Ask `text`, written by a prompt of that version, unless it is known or in flight. `read` makes
        the answer of what comes back; a ValueError of it means that this is none.
        """
        answer = None

        def check(content: str) -> None:
            nonlocal answer
            answer = read(content)

        def done(content: str | None, reason: str) -> None:  # in the back end's thread
            try:
                if content is not None:
                    self.ledger.put(key, kind, self.backend.name, version, content)
            except (OSError, ValueError) as error:  # ValueError: not text that can be written
                content, reason = None, str(error)
            if content is None:
                self.ledger.give_up(key, reason)
            self._arrived.put((key, None if content is None else answer, reason))

        key = ledger_key(self.backend.name, version, self.backend.settings, text)
        content = self._kept(key, version, text)
        with contextlib.suppress(ValueError):  # kept under older rules
            if content is not None:
                self._known.append((tag, read(content)))
                self.hits += 1
                return
        waiting = self._waiting.setdefault(key, [])
        waiting.append((tag, time.monotonic()))
        if len(waiting) > 1:
            self.hits += 1
        elif self.offline:
            reason = f"an answer is not in {self.ledger.path}, and judge.offline = true asks nobody"
            self._arrived.put((key, None, reason))
        elif not self.ledger.claim(key):
            self.hits += 1
            self._elsewhere[key] = read
        else:
            self.asked += 1
            self.backend.ask(Ask(kind=kind, text=text, check=check, done=done, posed=posed))

    def _kept(self, key: str, version: str, text: str) -> str | None:
        """What the ledger has."""
        content = self.ledger.get(key)
        if content is None and (other := self._other_name) is not None:
            content = self.ledger.get(ledger_key(other, version, self.backend.settings, text))
        return content

    @cached_property
    def _other_name(self) -> str | None:
        return self.ledger.other_name(self.backend.name)

    def answers(self, timeout: float | None = 0.0) -> list[tuple[Any, Any]]:
        """(tag, answer) of all that has come; None is no valid answer. When nothing has, wait so many
        seconds for something; None: until it comes.
        """
        come, self._known = self._known, []
        while True:
            works = bool(self._waiting) and self.backend.work()
            self._look_elsewhere()
            with contextlib.suppress(queue.Empty):
                while True:
                    wait = bool(self._waiting) and not come and not works and timeout != 0
                    patience = LOOK_S if self._elsewhere and timeout is None else timeout
                    key, answer, reason = self._arrived.get(wait, patience)
                    self.last_fault = reason or self.last_fault
                    self.failed += answer is None
                    for tag, since in self._waiting.pop(key):
                        come.append((tag, answer))
                        self.answer_seconds += time.monotonic() - since
            if come or timeout is not None or not self._waiting:
                return come

    def _look_elsewhere(self) -> None:
        """Whether others have found what they were asked in this process's place."""
        for key, read in [*self._elsewhere.items()]:
            content, reason = self.ledger.get(key), self.ledger.given_up(key)
            answer = None
            with contextlib.suppress(ValueError):
                answer = None if content is None else read(content)
            if answer is not None or reason is not None:
                del self._elsewhere[key]
                self._arrived.put((key, answer, reason or ""))

    @property
    def busy(self) -> bool:
        return bool(self._known or self._waiting)

    def close(self) -> None:
        self.backend.close()
        self.ledger.close()


class Fallible(Protocol):
    """Somebody who may leave dialogues without an answer, up to a share of them."""

    who: str
    max_unscored_share: float

    @property
    def last_fault(self) -> str: ...


def check_share(asked: Fallible, unscored: int, total: int, fault: str = "") -> None:
    """RuntimeError when more of `total` dialogues are unscored than is accepted, as soon as that is
    certain. `fault`: the last reason, where it is not one of this process.
    """
    if unscored > asked.max_unscored_share * total:
        fault = fault or asked.last_fault
        raise RuntimeError(
            f"{asked.who} failed: {unscored} of {total} dialogues are unscored, above "
            f"judge.max_unscored_share = {asked.max_unscored_share:g}; the last reason: {fault}. "
            "--resume goes on from the last checkpoint and asks nothing again that was answered"
        )
