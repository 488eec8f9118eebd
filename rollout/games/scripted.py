"""Scripted negotiators, whose dialogues a policy that starts from nothing imitates: what those of all games
share.
"""

from __future__ import annotations

import random
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

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


class Tactic(ABC):
    """Decides for a side in place of a temperament (characters.py)."""

    @abstractmethod
    def content(self, side: Side, offer: Vector) -> bool: ...  # whether to accept
    @abstractmethod
    def decide(self, side: Side) -> Act: ...  # what to say when no offer is accepted


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
    utterances: int = MAX_UTTERANCES  # of both, after which the talk is over
    heard: int = 0
    questions: int = 0  # asked so far
    offers: list[Vector] = field(default_factory=list)  # what each of the other's offers would leave me
    tactic: Tactic | None = None

    def act(self) -> Act:
        """The next utterance."""
        if self.last.accept and self.offered is not None and self.agreed is None:
            self.agreed = self.offered
            act = Act(confirm=True, close=True)
        elif self.agreed is not None:  # the other side did not close
            act = Act(confirm=True, close=True)
        elif self.offer is not None and self._accepts(self.offer):
            self.agreed = self.offer
            late = 2 * self.spoken + 2 >= self.utterances
            act = Act(accept=True, close=late or (self.spoken > 0 and self.chance(0.65)))
        else:
            act = self.tactic.decide(self) if self.tactic else self.decide()
        self.spoken += 1
        self.revealed |= act.reveal is not None
        self.asked |= act.ask
        self.questions += act.ask
        self.refusals += act.refuse
        self.offered = act.take or self.offered
        return act

    def hear(self, act: Act) -> None:
        """Another offer or a refusal takes back what was agreed; a close takes an offer that stands, and a
        character's own offer is meant by a close that says nothing else. An acceptance may say again what
        was offered; of something else it is an offer.
        """
        if act.accept and act.take is not None:
            same = self.left_by(act.take) == self.offered
            act = replace(act, accept=same, take=None if same else act.take)
        self.last = act
        self.heard += 1
        self.theirs = act.reveal or self.theirs
        self.offer = None if act.take is None else self.left_by(act.take)
        if self.offer is not None:
            self.offers.append(self.offer)
        if self.offer is not None or act.refuse or act.leave:
            self.agreed = None
        if not act.close or self.agreed is not None:
            return
        if act.accept or act.confirm or (self.tactic and act == Act(close=True)):
            self.agreed = self.offered
        elif self.offer is not None and self._accepts(self.offer):
            self.agreed = self.offer

    def _accepts(self, offer: Vector) -> bool:
        return self.tactic.content(self, offer) if self.tactic else self.content(offer)

    @property
    def pending(self) -> bool:
        """Whether the other's offer stands."""
        return self.offer is not None

    @property
    def time(self) -> float:
        """From 0 at its first turn to 1 at its last."""
        opens = (self.spoken + self.heard) % 2 == 0
        turns = (self.utterances + opens) // 2
        return min(1.0, self.spoken / (turns - 1)) if turns > 1 else 1.0

    @property
    def last_turn(self) -> bool:
        """Whether nobody speaks after its next utterance."""
        return self.spoken + self.heard + 1 >= self.utterances

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def repeat(self, turns: Sequence[tuple[bool, str]]) -> None:
        """Live through a talk: `turns` are (whether it spoke itself, what was said). Of its own it says all
        once more, since they follow from what it heard.
        """
        for own, text in turns:
            if own:
                self.say(self.act())
            else:
                self.hear(self.understand(text))

    @abstractmethod
    def content(self, offer: Vector) -> bool: ...  # whether to accept
    @abstractmethod
    def decide(self) -> Act: ...  # what to say when the other's offer, if there is one, is not accepted
    @abstractmethod
    def left_by(self, take: Vector) -> Vector: ...  # what the other's offer leaves me
    @abstractmethod
    def say(self, act: Act) -> str: ...  # my act in words
    @abstractmethod
    def understand(self, text: str) -> Act: ...  # what the other side's words say
    @abstractmethod
    def state(self) -> str: ...  # my final statement

    # What a tactic goes by.
    floor: ClassVar[float]  # the utility of the least that a side should take

    @property
    def hopeless(self) -> bool:
        """Whether the other's values leave nothing to agree on."""
        return False

    @abstractmethod
    def utility(self, take: Vector) -> float: ...  # of what I take, by my true values: 0 to 1
    @abstractmethod
    def proposal(self, least: float) -> Vector: ...  # of that utility, and good for the other side
    @abstractmethod
    def fairest(self, mine: Vector, theirs: Vector) -> Vector: ...  # the best for both, by such values
    @abstractmethod
    def claimed(self, lies: bool) -> Vector: ...  # the values that I state


@dataclass(kw_only=True, slots=True)
class ScriptedDialogue:
    """`turns` are (side, text, "utterance" | "final"); `final_prompt` comes before a final. `decisive` has,
    of each turn, where words begin and end on which depends what comes next; empty where none are known.
    `observed`: a side hears what its game tells it ("prompt") in place of the other's words.
    """

    scenario: Scenario
    first_speaker: int
    temperaments: tuple[str, str]
    turns: list[tuple[int, str, str]]
    outcome: Outcome
    final_prompt: str
    decisive: list[list[tuple[int, int]]] = field(default_factory=list)
    observed: bool = False


def hold(
    game: SelectionGame,
    scenario: Scenario,
    mixture: Mapping[str, float],
    rng: random.Random,
    side: Callable[..., Side],
) -> ScriptedDialogue:
    """Two whose names are drawn by weight negotiate; `side` makes one of a role, a name and draws."""
    first, second = rng.choices(list(mixture), weights=list(mixture.values()), k=2)
    return meet(game, scenario, (first, second), rng, side)


def meet(
    game: SelectionGame,
    scenario: Scenario,
    names: tuple[str, str],
    rng: random.Random,
    side: Callable[..., Side],
    utterances: int = MAX_UTTERANCES,
) -> ScriptedDialogue:
    """These two negotiate until one closes or has left for good. Each hears the other's words, as text."""
    sides = [side(i, names[i], random.Random(rng.getrandbits(64))) for i in (0, 1)]
    for one in sides:
        one.utterances = utterances
    first = rng.randrange(2)
    turns: list[tuple[int, str, str]] = []
    finals: tuple[str, str] | None = None
    left = False
    for n in range(utterances):
        who = (first + n) % 2
        act = sides[who].act()
        text = sides[who].say(act)
        turns.append((who, text, "utterance"))
        sides[1 - who].hear(sides[1 - who].understand(text))
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
        temperaments=names,
        turns=turns,
        outcome=game.judge(scenario, finals),
        final_prompt=game.final_prompt,
        decisive=[game.decisive(text) for _, text, _ in turns],
    )
