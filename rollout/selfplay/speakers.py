"""Who says the words of a side: the policy on its engine, an opponent on the same engine or another, a
server, a person.

All are a `Speaker`: they are asked for a turn and give its words back later, so that dialogues go on beside
each other. What an opponent says is never trained.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Completion, Request, SamplingParams
from duologue.rollout.games.game import Scenario
from duologue.rollout.judge.asking import Asking
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.wording import spoken
from duologue.rollout.selfplay.dialogue import Turn, View

LEFT = "left"  # finish_reason of a person who ends a talk without a word


@dataclass(frozen=True, kw_only=True, slots=True)
class Opponent:
    """Has the side `role` in place of the policy: `adapter` of `engine`, a scripted `character`, or without
    both whoever speaks from outside.
    """

    role: int
    name: str
    engine: Engine | None = None
    adapter: int = 0
    character: str = ""  # of a scripted negotiator (catalogue.py) that speaks


@dataclass(kw_only=True, slots=True, eq=False)
class Speak:
    """A turn that a protocol waits for. It is answered with the words as text, or with None when nobody
    answered.
    """

    role: int
    kind: int  # of the words, an index into KINDS
    view: View  # the context, and where the words go
    branch: Branch | None  # the context in an engine; None of somebody from outside
    grows: bool  # the context goes on after this turn
    params: SamplingParams
    told: str  # what the side was told, and what of the talk it heard, as text
    heard: Sequence[Turn]
    scenario: Scenario
    said: Sequence[Turn]  # all turns so far, heard or not
    question: str = ""
    legal: Sequence[str] | None = None  # the words that are open to it, where not all are


class Speaker(ABC):
    """Says the words of a side. Whoever has no engine here may fail, for up to a share of the dialogues."""

    who: str = "the policy"
    max_unscored_share: float = 0.0
    last_fault: str = ""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether something was asked and not answered yet."""

    def open(self, token_ids: Sequence[int], adapter: int = 0) -> Branch | None:
        """A live context that begins like this, for speakers that hold one."""
        return None

    @abstractmethod
    def ask(self, turn: Speak) -> None:
        """Begin to answer; returns at once."""

    @abstractmethod
    def answered(self, wait: bool) -> list[tuple[Speak, Completion | None]]:
        """What was answered since, after some work or, with `wait`, a little waiting; None is no answer."""

    def close(self) -> None:
        return


class EngineSpeaker(Speaker):
    """A policy on an engine; several adapters of it run in the same steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._turns: dict[Request, Speak] = {}

    @property
    def busy(self) -> bool:
        return bool(self._turns)

    def open(self, token_ids: Sequence[int], adapter: int = 0) -> Branch:
        return self.engine.open(token_ids, adapter)

    def ask(self, turn: Speak) -> None:
        assert turn.branch is not None
        self._turns[self.engine.start(turn.branch, turn.params)] = turn

    def answered(self, wait: bool) -> list[tuple[Speak, Completion | None]]:
        return [(self._turns.pop(request), request.completion) for request in self.engine.step()]


class Server(Asking, Speaker):
    """A server with OpenAI's chat completions. It hears the talk as text; what it says is tokenised once,
    here.

    Every answer is kept in a ledger under what was asked, so that a resumed run hears the same.
    """

    who = "the opponent's server"

    def __init__(
        self,
        url: str,
        model: str,
        ledger: Ledger,
        tokenizer: Tokenizer,
        max_unscored_share: float,
        **limits: Any,
    ) -> None:
        """`limits` and the key are those of `judge.endpoint.Endpoint`."""
        # Here, so that whoever asks no server needs no HTTP client.
        from duologue.rollout.judge.endpoint import ChatEndpoint

        self.max_unscored_share = max_unscored_share
        super().__init__(ChatEndpoint(url, model, **limits), ledger)
        self._tokenizer = tokenizer

    def ask(self, turn: Speak) -> None:
        params = turn.params
        assert params.seed is not None
        body = {
            "messages": messages(turn.told, turn.heard, turn.role, turn.question),
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed % 2**31,  # some servers take 32 bits
        }
        self.begin(turn, kind="turn", version="turn", text=json.dumps(body), read=spoken)

    def answered(self, wait: bool) -> list[tuple[Speak, Completion | None]]:
        answers = self.answers(0.02 if wait else 0.0)
        return [
            (turn, text if text is None else completion_of(self._tokenizer, text, turn.params.max_new_tokens))
            for turn, text in answers
        ]


def completion_of(tokenizer: Tokenizer, text: str, limit: int) -> Completion:
    """Words from outside as a reply of the policy would be, tokenised once, here: it ends with the stop
    token, unless it is cut at the limit of a turn.
    """
    ids, end = tokenizer.encode(text.strip()), tokenizer.turn_chat.end_token_id
    return Completion(token_ids=[*ids, end] if len(ids) < limit else ids[:limit])


class Speakers:
    """Finds who has a side, and lets all who were asked go on."""

    def __init__(self, policy: Speaker, scripted: Callable[[str], Speaker]) -> None:
        """`scripted` makes the speaker of a character."""
        self.policy = policy
        self._make_scripted = scripted
        self._scripted: dict[str, Speaker] = {}
        self.outside: Speaker | None = None
        self._engines: dict[Engine, EngineSpeaker] = {}
        if isinstance(policy, EngineSpeaker):
            self._engines[policy.engine] = policy

    def of(self, opponent: Opponent | None, role: int) -> Speaker:
        if opponent is None or opponent.role != role:
            return self.policy
        if opponent.character:
            if opponent.character not in self._scripted:
                self._scripted[opponent.character] = self._make_scripted(opponent.character)
            return self._scripted[opponent.character]
        if opponent.engine is not None:
            return self._engines.setdefault(opponent.engine, EngineSpeaker(opponent.engine))
        assert self.outside is not None
        return self.outside

    def open(self, opponent: Opponent | None, role: int, token_ids: Sequence[int]) -> Branch | None:
        """A context of a side, where its speaker holds one."""
        adapter = opponent.adapter if opponent is not None and opponent.role == role else 0
        return self.of(opponent, role).open(token_ids, adapter)

    @property
    def busy(self) -> bool:
        return any(speaker.busy for speaker in self._all())

    def answered(self) -> list[tuple[Speak, Completion | None]]:
        """One step of every engine at work, and what came from outside, for which it waits where nothing
        else is to do.
        """
        answers: list[tuple[Speak, Completion | None]] = []
        idle = True
        for speaker in self._all():
            if speaker.busy:
                answers += speaker.answered(wait=idle)
                idle = False
        return answers

    def _all(self) -> Iterator[Speaker]:
        yield from dict.fromkeys([self.policy, *self._engines.values(), *self._scripted.values()])
        if self.outside is not None:
            yield self.outside

    def close(self) -> None:
        for speaker in self._all():
            speaker.close()


def prefill(branches: Sequence[Branch | None]) -> None:
    """Compute the KV of contexts that will be forked or shared."""
    by_engine: dict[Engine, list[Branch]] = {}
    for branch in branches:
        if branch is not None:
            assert branch.engine is not None
            by_engine.setdefault(branch.engine, []).append(branch)
    for engine, opened in by_engine.items():
        engine.prefill(opened)


OPENS, GOES_ON = "You speak first.", "The talk goes on."  # a user's message where nobody has spoken yet


def messages(told: str, turns: Sequence[Turn], role: int, question: str = "") -> list[dict[str, str]]:
    """What `role` was told, has heard and said, as a chat: after what it was told a user's message and its
    own in turns, as many templates ask for. Neighbours of one role are one message, and where nothing was
    heard before it speaks there is a message that says so.
    """
    own = {"utterance": "assistant", "prompt": "user"}
    said = [(own[t.kind] if t.role == role else "user", t.text) for t in turns if t.kind in own]
    if question:
        said.append(("user", question))
    chat = [{"role": "system", "content": told}]
    for speaker, text in said:
        if chat[-1]["role"] == speaker:
            chat[-1]["content"] += f"\n\n{text}"
        else:
            chat.append({"role": speaker, "content": text})
    if len(chat) == 1 or chat[1]["role"] == "assistant":
        chat.insert(1, {"role": "user", "content": OPENS if len(chat) == 1 else GOES_ON})
    return chat
