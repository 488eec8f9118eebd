"""A dialogue as data: the turns, and the token-exact view that each side has of them.

A `View` is one side's context with its provenance. It is the only place where the loss mask comes from: a
token is marked if and only if it was sampled by this policy on this side, in a turn of a named kind,
together with its behaviour log-prob.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from duologue.model.chat import Chat
from duologue.rollout.engine.sequence import Supports
from duologue.rollout.games.game import Game, Outcome, Scenario

POLICY = "policy"  # the player whose tokens are trained
KINDS = ("prompt", "utterance", "final")  # a token's kind is an index into this; 0 is never trained
PROMPT, UTTERANCE, FINAL = range(3)


@dataclass(kw_only=True, slots=True)
class Turn:
    """What one side said. `token_ids` are those that were sampled, a sampled stop token included."""

    role: int
    kind: str  # "utterance" | "final" | "prompt"
    text: str  # a view for people and game rules; never tokenised again
    token_ids: list[int]
    logprobs: list[float] | None  # None: not sampled (a script, a person, a prompt)


@dataclass(slots=True)
class View:
    """One side's context, append-only. `kinds[t]` indexes KINDS; `logprobs[t]` is 0 where nothing was
    sampled.
    """

    token_ids: list[int] = field(default_factory=list)  # [T]
    kinds: list[int] = field(default_factory=list)  # [T]
    logprobs: list[float] = field(default_factory=list)  # [T]
    supports: Supports = field(default_factory=Supports)  # [T], what sampled tokens were drawn from

    def prompt(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        self.kinds += [PROMPT] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)
        self.supports.sizes += [0] * len(token_ids)

    def said(
        self, token_ids: list[int], logprobs: list[float] | None, kind: int, supports: Supports | None = None
    ) -> None:
        """This side's own words. Without log-probs they are a demonstration: marked, to be imitated."""
        assert kind != PROMPT
        assert logprobs is None or len(logprobs) == len(token_ids)
        self.token_ids += token_ids
        self.kinds += [kind] * len(token_ids)
        self.logprobs += logprobs if logprobs is not None else [0.0] * len(token_ids)
        self.supports.extend(supports or Supports([0] * len(token_ids)))
        assert len(self.supports.sizes) == len(self.token_ids)


class Transcript:
    """Keeps both views in step while a dialogue is held. Private text enters one view only, here, and
    nothing else does.
    """

    def __init__(self, chat: Chat, private_ids: tuple[list[int], list[int]]) -> None:
        self.chat = chat
        self.turns: list[Turn] = []
        self.views = (View(), View())
        for view, ids in zip(self.views, private_ids, strict=True):
            view.prompt(chat.open(ids))

    def ask(self, role: int, question_ids: list[int] | None = None) -> None:
        """Make it `role`'s turn to speak, after an optional question that only this side hears."""
        view = self.views[role]
        if question_ids is not None:
            view.prompt(self.chat.heard(question_ids))
        view.prompt(self.chat.reply())

    def say(
        self,
        role: int,
        token_ids: list[int],
        logprobs: list[float] | None,
        kind: int,
        text: str,
        supports: Supports | None = None,
        opponent: bool = False,
    ) -> None:
        """`role` spoke. An utterance is heard by the other side, id for id; a final statement is not. An
        opponent's words are marked as a prompt's, so that they are never trained.
        """
        stopped = bool(token_ids) and token_ids[-1] in self.chat.stop_token_ids
        if opponent:
            self.views[role].prompt(token_ids)
        else:
            self.views[role].said(token_ids, logprobs, kind, supports)
        self.views[role].prompt(self.chat.close_reply(stopped))
        if kind == UTTERANCE:
            self.views[1 - role].prompt(self.chat.heard(token_ids[:-1] if stopped else token_ids))
        self.turns.append(
            Turn(role=role, kind=KINDS[kind], text=text, token_ids=token_ids, logprobs=logprobs)
        )


@dataclass(kw_only=True, slots=True)
class Dialogue:
    """One dialogue from start to outcome. `reward` is None while, or because, it is unscored.

    `views[i]` is a context of side `view_roles[i]`: one per side where contexts grow, otherwise one per turn.
    """

    scenario: Scenario
    first_speaker: int
    turns: list[Turn]
    views: tuple[View, ...]
    view_roles: tuple[int, ...] = (0, 1)
    players: tuple[str, str] = (POLICY, POLICY)  # of side 0 and 1
    outcome: Outcome | None = None
    reward: tuple[float, float] | None = None
    advantage: tuple[float, float] | None = None
    weights_version: int = 0

    def record(self, **extra: Any) -> dict[str, Any]:
        """The dialogue as an object for dialogues.jsonl."""
        outcome = self.outcome
        return {
            **extra,
            "scenario": {
                "game": self.scenario.game,
                "id": self.scenario.id,
                "split": self.scenario.split,
                "private": list(self.scenario.private_text),
                **({"shared": self.scenario.shared_text} if self.scenario.shared_text else {}),
            },
            "personas": [{"name": p.name, "instructions": p.instructions} for p in self.scenario.personas],
            "turns": [
                {
                    "role": t.role,
                    "kind": t.kind,
                    "text": t.text,
                    "token_ids": t.token_ids,
                    "logprobs": t.logprobs,
                }
                for t in self.turns
            ],
            "outcome": outcome
            and {
                "agreed": outcome.agreed,
                "scores": list(outcome.scores),
                "failure": outcome.failure,
                "metrics": outcome.metrics,
                **({} if outcome.rounds is None else {"rounds": outcome.rounds}),
                **({"reason": outcome.reason} if outcome.reason else {}),
            },
            "reward": self.reward and list(self.reward),
            "advantage": self.advantage and list(self.advantage),
            "weights_version": self.weights_version,
            "players": list(self.players),
        }


@dataclass(kw_only=True, slots=True)
class Group:
    """The G dialogues of one scenario with one first speaker: the unit of the group-relative advantage."""

    scenario: Scenario
    dialogues: list[Dialogue]


def assign_rewards(game: Game, dialogues: Iterable[Dialogue]) -> None:
    """Write into every dialogue what it is worth to each side by the game's rules, None where it is
    unscored.
    """
    for dialogue in dialogues:
        if dialogue.outcome is not None:  # else an opponent's server gave no answer
            dialogue.reward = game.rewards(dialogue.scenario, dialogue.outcome)
