"""A dialogue as data: the turns, and the token-exact view that each side has of them.

A `View` is one side's context with its provenance. It is the only place where the loss mask comes from: a
token is marked if and only if it was sampled by this policy on this side, in a turn of a named kind,
together with its behaviour log-prob.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from duologue.model.chat import Chat
from duologue.rollout.engine.sequence import Supports
from duologue.rollout.games.game import Game, Outcome, Scenario

POLICY = "policy"  # the player whose tokens are trained
KINDS = ("prompt", "utterance", "final")  # a token's kind is an index into this; 0 is never trained
PROMPT, UTTERANCE, FINAL = range(3)
RECORDED = ("role", "kind", "text", "token_ids", "logprobs")  # of a turn, always


@dataclass(kw_only=True, slots=True)
class Turn:
    """What one side said. `token_ids` are those that were sampled, a sampled stop token included."""

    role: int
    kind: str  # "utterance" | "final" | "prompt"
    text: str  # a view for people and game rules; never tokenised again
    token_ids: list[int]
    logprobs: list[float] | None  # None: not sampled (a script, a person, a prompt)
    entropies: list[float] = field(default_factory=list)  # nats, of what each was drawn from; empty: unknown
    support_sizes: list[int] = field(default_factory=list)  # tokens that each was drawn from; 0: all

    def record(self, by_token: bool = False) -> dict[str, Any]:
        """As an object for dialogues.jsonl. Nine digits tell fp32 numbers apart."""
        row: dict[str, Any] = {name: getattr(self, name) for name in RECORDED}
        if by_token and self.entropies:
            row["entropies"] = [float(f"{value:.9g}") for value in self.entropies]
        if by_token and any(self.support_sizes):
            row["support_sizes"] = self.support_sizes
        return row


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

    def say(self, turn: Turn, supports: Supports | None = None, opponent: bool = False) -> None:
        """This side's own words. Without log-probs they are a demonstration: marked, to be imitated. An
        opponent's are marked as a prompt's, so that they are never trained.
        """
        if opponent:
            self.prompt(turn.token_ids)
            return
        n = len(turn.token_ids)
        logprobs = [0.0] * n if turn.logprobs is None else turn.logprobs
        assert len(logprobs) == n
        self.token_ids += turn.token_ids
        self.kinds += [KINDS.index(turn.kind)] * n
        self.logprobs += logprobs
        self.supports.extend(supports or Supports([0] * n))
        assert len(self.supports.sizes) == len(self.token_ids)

    def cut(self, n: int) -> None:
        """Drop all but the first `n` tokens of a demonstration: nothing was drawn from a smaller support."""
        assert not self.supports.ids
        for column in (self.token_ids, self.kinds, self.logprobs, self.supports.sizes):
            del column[n:]


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

    def tell(self, turn: Turn) -> None:
        """A side hears something that nobody sampled: what a game tells it."""
        self.views[turn.role].prompt(self.chat.heard(turn.token_ids))
        self.turns.append(turn)

    def say(
        self, turn: Turn, supports: Supports | None = None, opponent: bool = False, heard: bool = True
    ) -> None:
        """A side spoke. Where it is `heard`, an utterance goes to the other side id for id; a final statement
        never does.
        """
        view, other, ids = self.views[turn.role], self.views[1 - turn.role], turn.token_ids
        stopped = bool(ids) and ids[-1] in self.chat.stop_token_ids
        view.say(turn, supports, opponent)
        view.prompt(self.chat.close_reply(stopped))
        if turn.kind == "utterance" and heard:
            other.prompt(self.chat.heard(ids[:-1] if stopped else ids))
        self.turns.append(turn)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question that the judge was asked about the first `turns` turns, and its answer, None where there is
    none. The dialogue waited `seconds` for it: next to nothing where the ledger had the answer.
    """

    kind: str
    turns: int
    answer: dict[str, Any] | None
    seconds: float


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
    # Before each turn that was spoken, where they are noted: the scores as they stood.
    so_far: tuple[tuple[float, float], ...] = ()
    # From each of these on: the reward less what those scores are worth.
    returns: tuple[tuple[float, float], ...] = ()
    turn_advantages: tuple[float, ...] = ()  # of the same turns, 0 where nothing is trained
    weights_version: int = 0
    asked: Sequence[Asked] = ()

    def record(self, by_token: bool = False, **extra: Any) -> dict[str, Any]:
        """The dialogue as an object for dialogues.jsonl. `by_token`: with what is known of each token beside
        its log-prob, and with what the judge was asked (train.record_tokens).
        """
        s = self.scenario
        scenario = {"game": s.game, "id": s.id, "split": s.split, "private": list(s.private_text)}
        if s.shared_text:
            scenario["shared"] = s.shared_text
        outcome = self.outcome and asdict(self.outcome)
        for name in ("rounds", "reason"):
            if outcome and outcome[name] in (None, ""):
                del outcome[name]
        by_turn = {name: getattr(self, name) for name in ("so_far", "returns", "turn_advantages")}
        more = {"asked": [asdict(asked) for asked in self.asked]} if by_token and self.asked else {}
        return {
            **extra,
            **more,
            "scenario": scenario,
            "personas": [asdict(persona) for persona in s.personas],
            "turns": [turn.record(by_token) for turn in self.turns],
            "outcome": outcome,
            "reward": self.reward,
            "advantage": self.advantage,
            "weights_version": self.weights_version,
            "players": self.players,
            **{name: values for name, values in by_turn.items() if values},
        }

    @property
    def spoken(self) -> list[Turn]:
        """The turns without what a game told the sides."""
        return [turn for turn in self.turns if turn.kind != "prompt"]


@dataclass(kw_only=True, slots=True)
class Group:
    """The G dialogues of one scenario with one first speaker: the unit of the group-relative advantage.

    `dropped` were played before in its place, from other scenarios; nothing was to be learned in them.
    """

    scenario: Scenario
    dialogues: list[Dialogue]
    dropped: tuple[Group, ...] = ()

    @property
    def drawn(self) -> Group:
        """The one that was played first: nothing that came of a group has chosen it."""
        return self.dropped[0] if self.dropped else self


def assign_rewards(game: Game, dialogues: Iterable[Dialogue]) -> None:
    """Write into every dialogue what it is worth to each side by the game's rules, None where it is
    unscored.
    """
    for dialogue in dialogues:
        if dialogue.outcome is not None:  # else an opponent's server gave no answer
            dialogue.reward = game.rewards(dialogue.scenario, dialogue.outcome)
        if dialogue.reward is not None:
            dialogue.returns = tuple(_to_go(game, dialogue, scores) for scores in dialogue.so_far)


def _to_go(game: Game, dialogue: Dialogue, scores: tuple[float, float]) -> tuple[float, float]:
    """What the reward is more than that of a dialogue that ends with these scores."""
    worth, reward = game.rewards(dialogue.scenario, Outcome(agreed=True, scores=scores)), dialogue.reward
    assert worth is not None
    assert reward is not None
    return reward[0] - worth[0], reward[1] - worth[1]
