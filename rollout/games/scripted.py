"""Scripted negotiators, whose dialogues a policy that starts from nothing imitates: what those of all games
share.
"""

from __future__ import annotations

import random
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.games.selection import SelectionGame, Vector

MAX_UTTERANCES = 9  # of a scripted dialogue


@dataclass(frozen=True, kw_only=True, slots=True)
class Act:
    """An utterance before it is words: all that the other side learns from it. A price is a vector of one."""

    accept: bool = False  # of the offer that stands
    confirm: bool = False  # that the other side accepted
    refuse: bool = False
    reveal: Vector | None = None  # the speaker's exact values
    want: int | None = None  # an item type, as are the next
    spare: int | None = None
    take: Vector | None = None  # an offer: what the speaker would take, or the price
    best: bool = False  # `take` is the best for both that the speaker can see
    against: Vector | None = None  # with `reveal` and `take`: the other's values, item by item
    ask: bool = False
    leave: bool = False
    close: bool = False


START = Act()


@cache
def phrases(game: str) -> dict[str, list[str]]:
    """The forms of utterances in the game's file of words."""
    return tomllib.loads((Path(__file__).parent / f"{game}_words.toml").read_text("utf-8"))


@dataclass(slots=True)
class Side(ABC):
    """A scripted side. It decides from its own values, from what it has said and from what it has heard."""

    values: Vector
    temperament: str
    rng: random.Random
    theirs: Vector | None = None  # the other's values, once stated
    last: Act = START  # what the other side said last
    offer: Vector | None = None  # what that would leave me
    offered: Vector | None = None  # my last offer: what I would take
    agreed: Vector | None = None  # what I take, once we agree
    revealed: bool = False
    asked: bool = False
    refusals: int = 0
    spoken: int = 0

    def act(self) -> Act:
        """The next utterance."""
        if self.last.accept:
            self.agreed = self.offered
            act = Act(confirm=True, close=True)
        elif self.offer is not None and self.content(self.offer):
            self.agreed = self.offer
            late = 2 * self.spoken + 2 >= MAX_UTTERANCES
            act = Act(accept=True, close=late or (self.spoken > 0 and self.chance(0.65)))
        else:
            act = self.decide()
        self.spoken += 1
        self.revealed |= act.reveal is not None
        self.asked |= act.ask
        self.refusals += act.refuse
        self.offered = act.take or self.offered
        return act

    def hear(self, act: Act) -> None:
        self.last = act
        self.theirs = act.reveal or self.theirs
        self.offer = None if act.take is None else self.left_by(act.take)
        if act.accept and act.close:
            self.agreed = self.offered

    @property
    def pending(self) -> bool:
        """Whether the other's offer stands."""
        return self.offer is not None

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    @abstractmethod
    def content(self, offer: Vector) -> bool: ...  # whether to accept
    @abstractmethod
    def decide(self) -> Act: ...  # what to say when the other's offer, if there is one, is not accepted
    @abstractmethod
    def left_by(self, take: Vector) -> Vector: ...  # what the other's offer leaves me
    @abstractmethod
    def say(self, act: Act) -> str: ...  # my act in words
    @abstractmethod
    def state(self) -> str: ...  # my final statement


@dataclass(kw_only=True, slots=True)
class ScriptedDialogue:
    """`turns` are (side, text, "utterance" | "final"); `final_prompt` comes before a final."""

    scenario: Scenario
    first_speaker: int
    temperaments: tuple[str, str]
    turns: list[tuple[int, str, str]]
    outcome: Outcome
    final_prompt: str


def hold(
    game: SelectionGame,
    scenario: Scenario,
    temperaments: Mapping[str, float],
    rng: random.Random,
    side: Callable[..., Side],
) -> ScriptedDialogue:
    """Two sides with temperaments drawn by weight negotiate until one closes or has left for good; `side`
    makes number i.
    """
    names = rng.choices(list(temperaments), weights=list(temperaments.values()), k=2)
    sides = [side(i, names[i], random.Random(rng.getrandbits(64))) for i in (0, 1)]
    first = rng.randrange(2)
    turns: list[tuple[int, str, str]] = []
    finals: tuple[str, str] | None = None
    left = False
    for n in range(MAX_UTTERANCES):
        who = (first + n) % 2
        act = sides[who].act()
        turns.append((who, sides[who].say(act), "utterance"))
        sides[1 - who].hear(act)
        if act.close:
            finals = (sides[0].state(), sides[1].state())
            turns += [(role, finals[role], "final") for role in (who, 1 - who)]
            break
        if act.leave and left and rng.random() < 0.5:
            break
        left = act.leave
    return ScriptedDialogue(
        scenario=scenario,
        first_speaker=first,
        temperaments=(names[0], names[1]),
        turns=turns,
        outcome=game.judge(scenario, finals),
        final_prompt=game.final_prompt,
    )
