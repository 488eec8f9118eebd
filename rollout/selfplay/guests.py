"""Who speaks: the policy, or on one side of a group a guest, whose tokens are never trained.

A guest is another adapter on the policy's engine, whose rows run in the same steps; weights on an engine of their own; or a server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Completion, Request, SamplingParams
from duologue.rollout.selfplay.dialogue import POLICY, Turn

if TYPE_CHECKING:
    from duologue.rollout.selfplay.remote import Remote

Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Guest:
    """Speaks for the side `role`: `adapter` of `engine`, or without one the server."""

    role: int
    name: str
    engine: Engine | None = None
    adapter: int = 0


class Speakers(Generic[T]):
    """Asks whoever has a side for the next words, and gives them back under the tag that they were asked for with."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine  # the policy's
        self.server: Remote | None = None
        self.max_unscored_share = 0.1
        self._requests: dict[Request, tuple[Branch, T]] = {}
        self._remote: dict[int, T] = {}
        self._n_asked = 0

    def open(self, guest: Guest | None, role: int, token_ids: Sequence[int]) -> Branch:
        """A branch for a side. A server's keeps its ids only."""
        if guest is None or guest.role != role or guest.engine is None:
            return self.engine.open(token_ids)
        return guest.engine.open(token_ids, guest.adapter)

    def prefill(self, branches: Iterable[tuple[Guest | None, int, Branch]]) -> None:
        """Compute the KV of contexts that will be forked or shared."""
        by_engine: dict[Engine, list[Branch]] = {}
        for guest, role, branch in branches:
            if not behind_network(guest, role):
                assert branch.engine is not None
                by_engine.setdefault(branch.engine, []).append(branch)
        for engine, those in by_engine.items():
            engine.prefill(those)

    def start(self, tag: T, branch: Branch, params: SamplingParams) -> None:
        """Ask the engine of a branch."""
        assert branch.engine is not None
        self._requests[branch.engine.start(branch, params)] = branch, tag

    def ask(self, tag: T, messages: list[Message], params: SamplingParams) -> None:
        """Ask the server."""
        assert self.server is not None
        self._n_asked += 1
        self._remote[self._n_asked] = tag
        self.server.ask(self._n_asked, messages, params)

    @property
    def busy(self) -> bool:
        return bool(self._requests or self._remote)

    def step(self) -> list[tuple[T, Completion | None]]:
        """One step of every engine at work, and what the server has answered; None is no answer. Waits a little for the server
        when there is nothing else to do."""
        found: list[tuple[T, Completion | None]] = []
        engines = list(dict.fromkeys(branch.engine for branch, _ in self._requests.values()))
        for engine in filter(None, engines):
            found += [(self._requests.pop(request)[1], request.completion) for request in engine.step()]
        if self._remote:
            assert self.server is not None
            for number, ids in self.server.answered(0.0 if engines else 0.02):
                said = (
                    None
                    if ids is None
                    else Completion(token_ids=ids, weights_version=self.engine.weights_version)
                )
                found.append((self._remote.pop(number), said))
        return found

    def close(self) -> None:
        if self.server is not None:
            self.server.close()

    def check_share(self, unscored: int, total: int) -> None:
        """RuntimeError when more of `total` dialogues were left without an answer than is accepted."""
        if unscored > self.max_unscored_share * total:
            assert self.server is not None
            raise RuntimeError(
                f"the opponent's server failed: {unscored} of {total} dialogues are unscored, above judge.max_unscored_share = "
                f"{self.max_unscored_share:g}; the last reason: {self.server.last_fault}. --resume goes on from the last checkpoint"
            )


def behind_network(guest: Guest | None, role: int) -> bool:
    """Whether a server speaks for this side."""
    return guest is not None and guest.role == role and guest.engine is None


def players(guest: Guest | None) -> tuple[str, str]:
    """Who has side 0 and side 1."""
    if guest is None:
        return POLICY, POLICY
    return (guest.name, POLICY) if guest.role == 0 else (POLICY, guest.name)


def messages(private_text: str, turns: Sequence[Turn], role: int, question: str = "") -> list[Message]:
    """What `role` has heard and said, as text for a server. Neighbours of one role are one message, as some templates ask for."""
    talk = [
        ("assistant" if turn.role == role else "user", turn.text)
        for turn in turns
        if turn.kind == "utterance"
    ]
    talk += [("user", question)] if question else []
    found = [{"role": "system", "content": private_text}]
    for speaker, text in talk:
        if found[-1]["role"] == speaker:
            found[-1]["content"] += f"\n\n{text}"
        else:
            found.append({"role": speaker, "content": text})
    return found
