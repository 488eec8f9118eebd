"""Characters: how a scripted negotiator concedes, what it tells and what it never accepts, whatever the game.

Tactics that depend on time and on the other's behaviour are those of Faratin, Sierra and Jennings (1998,
"Negotiation decision functions for autonomous agents"). A side's utility of an offer is between 0 and 1 by
its true values; at each turn it has an aspiration, makes offers of at least that utility and accepts none
below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from duologue.rollout.games.scripted import START, Act, Side, Tactic
from duologue.rollout.games.selection import Vector

GOODWILL = 0.2  # tit for tat's first concession, for else two of them would wait for each other forever
QUESTIONS = 2  # that are asked at most, before a side goes by what it knows


@dataclass(frozen=True, kw_only=True, slots=True)
class Character(Tactic):
    """`pace` is 1 / beta of the polynomial tactic: the aspiration falls with (time / deadline) ** pace."""

    meaning: str
    pace: float = 1.0
    mirrors: bool = False  # concedes as much as the other did
    states: bool = False  # its values, and offers what is best for both by the values that were stated
    lies: bool = False  # about them
    answers: bool = False  # with its values when it is asked
    patience: int = 0  # its own deadline, in own turns: it offers its least, then leaves; 0: the talk's
    more: float = 0.0  # utility that it wants above the game's floor

    def reservation(self, side: Side) -> float:
        """The utility of the least that it ever takes."""
        return side.floor + self.more

    def aspiration(self, side: Side) -> float:
        """The utility below which the side neither offers nor accepts at this turn."""
        least = self.reservation(side)
        if self.mirrors:
            trust = GOODWILL * (side.spoken > 0) + GOODWILL * (side.theirs is not None)
            offers = side.offers
            conceded = side.utility(offers[-1]) - side.utility(offers[0]) if offers else 0.0
            return max(least, min(1.0, 1.0 - trust - conceded))
        time = side.spoken / self.patience if self.patience else side.time
        share: float = min(1.0, time) ** self.pace
        return least + (1.0 - least) * (1.0 - share)

    def content(self, side: Side, offer: Vector) -> bool:
        """With the other's values, who states its own is content with the best for both."""
        least = self.aspiration(side)
        if self.states and side.theirs is not None:
            best = side.utility(side.fairest(side.claimed(self.lies), side.theirs))
            least = min(least, max(best, self.reservation(side) if self.lies else 0.0))
        return side.utility(offer) >= least

    def decide(self, side: Side) -> Act:
        """Leaves where nothing is to be had, else tells, asks or offers."""
        if side.hopeless or side.last_turn or self._has_waited(side):
            return Act(leave=True, close=True)
        if self.states and not (side.theirs is None and side.revealed):
            return self._open(side)
        lost = side.spoken > 0 and side.last == START  # nothing was understood
        if side.questions < QUESTIONS and not side.pending and (self.states or (lost and side.chance(0.5))):
            return Act(ask=True)
        if self.answers and side.last.ask and not side.revealed:
            return Act(reveal=side.values, refuse=side.pending)
        return Act(take=side.proposal(self.aspiration(side)), refuse=side.pending)

    def _has_waited(self, side: Side) -> bool:
        """Out of patience: it has offered to take its least, and nobody gives that."""
        return 0 < self.patience < side.spoken

    def _open(self, side: Side) -> Act:
        """States the values, asks for the other's, and offers what is best for both by what was stated."""
        stated, theirs = side.claimed(self.lies), side.theirs
        if not side.revealed and (theirs is None or side.chance(0.3)):
            return Act(reveal=stated, ask=theirs is None and side.chance(0.5), refuse=side.pending)
        assert theirs is not None
        take = side.fairest(stated, theirs)
        if self.lies and side.utility(take) < self.aspiration(side):
            return Act(take=side.proposal(self.aspiration(side)), refuse=side.pending)
        if side.chance(0.35):
            return Act(take=take, best=True, refuse=side.pending)
        return Act(take=take, best=True, reveal=stated, against=theirs)


TACTICS: Mapping[str, Character] = {
    "conceder": Character(
        meaning="concedes early, and states its values when asked", pace=0.25, answers=True
    ),
    "boulware": Character(meaning="stays at what it asked for until shortly before the deadline", pace=2.5),
    "tit_for_tat": Character(meaning="concedes as much as the other side did", mirrors=True),
    "honest": Character(meaning="states its true values, and offers what is best for both", states=True),
    "liar": Character(
        meaning="states values that are not its own, and offers what is best by these", states=True, lies=True
    ),
    "walker": Character(
        meaning="offers the least that it would take after two turns, and then leaves", patience=2, more=0.1
    ),
}
