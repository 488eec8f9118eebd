"""Characters: how a scripted negotiator concedes, what it tells and what it never accepts, whatever the game.

Tactics that depend on time and on the other's behaviour are those of Faratin, Sierra and Jennings (1998,
"Negotiation decision functions for autonomous agents"). A side's utility of an offer is between 0 and 1 by
its true values; at each turn it has an aspiration, makes offers of at least that utility and accepts none
below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from duologue.rollout.games.scripted import START, Act, Side
from duologue.rollout.games.selection import Vector

GOODWILL = 0.15  # tit for tat's first concession, for else two of them would wait for each other forever
QUESTIONS = 2  # that are asked at most, before a side goes by what it knows


@dataclass(frozen=True, kw_only=True, slots=True)
class Tactic:
    """`pace` is 1 / beta of the polynomial tactic: the aspiration falls with (time / deadline) ** pace."""

    meaning: str
    pace: float = 1.0
    mirrors: bool = False  # concedes as much as the other did
    states: bool = False  # its values, and offers what is best for both by the values that were stated
    lies: bool = False  # about them
    answers: bool = False  # with its values when it is asked
    patience: int = 0  # own turns after which it leaves where nothing good was offered; 0: never
    floor: float = 1.0  # its reservation, in terms of the game's


TACTICS: Mapping[str, Tactic] = {
    "conceder": Tactic(meaning="concedes early, and states its values when asked", pace=0.25, answers=True),
    "boulware": Tactic(meaning="stays at what it asked for until shortly before the deadline", pace=4.0),
    "tit_for_tat": Tactic(meaning="concedes as much as the other side did", mirrors=True),
    "honest": Tactic(meaning="states its true values and offers what is best for both", states=True),
    "liar": Tactic(
        meaning="states values that are not its own, and offers what is best by these", states=True, lies=True
    ),
    "walker": Tactic(meaning="walks away when nothing good is offered soon", patience=2, floor=1.5),
}


def aspiration(side: Side, tactic: Tactic) -> float:
    """The utility below which the side neither offers nor accepts at this turn."""
    floor = min(1.0, side.floor * tactic.floor)
    if tactic.mirrors:
        trust = GOODWILL * (side.spoken > 0) + GOODWILL * (side.theirs is not None)
        offers = side.offers
        conceded = side.utility(offers[-1]) - side.utility(offers[0]) if offers else 0.0
        return max(floor, min(1.0, 1.0 - trust - conceded))
    conceded_share: float = side.time**tactic.pace
    return floor + (1.0 - floor) * (1.0 - conceded_share)


def content(side: Side, tactic: Tactic, offer: Vector) -> bool:
    """Whether the side accepts the offer."""
    least = aspiration(side, tactic)
    if tactic.states and side.theirs is not None:
        least = min(least, side.utility(side.fairest(side.claimed(tactic.lies), side.theirs)))
    floor = 0.0 if tactic.states and not tactic.lies else min(1.0, side.floor * tactic.floor)
    return side.utility(offer) >= max(least, floor)


def decide(side: Side, tactic: Tactic) -> Act:
    """What to say when there is no offer, or none to accept."""
    if side.hopeless or side.last_turn or _has_waited(side, tactic):
        return Act(leave=True, close=True)
    lost = side.spoken > 0 and side.last == START  # nothing was understood
    if lost and not tactic.states and side.questions < QUESTIONS and side.chance(0.5):
        return Act(ask=True)
    if tactic.states:
        return _open(side, tactic)
    if tactic.answers and side.last.ask and not side.revealed:
        return Act(reveal=side.values, refuse=side.pending)
    return Act(take=side.proposal(aspiration(side, tactic)), refuse=side.pending)


def _has_waited(side: Side, tactic: Tactic) -> bool:
    """Out of patience: no offer so far was as good as the least that it would take in the end."""
    if not tactic.patience or side.spoken < tactic.patience:
        return False
    floor = min(1.0, side.floor * tactic.floor)
    return all(side.utility(offer) < floor for offer in side.offers)


def _open(side: Side, tactic: Tactic) -> Act:
    """States the values, asks for the other's, and offers what is best for both by what was stated."""
    stated, theirs = side.claimed(tactic.lies), side.theirs
    if theirs is None:
        if not side.revealed:
            return Act(reveal=stated, ask=side.chance(0.5), refuse=side.pending)
        if side.questions < QUESTIONS and not side.pending:
            return Act(ask=True, refuse=side.pending)
        return Act(take=side.proposal(aspiration(side, tactic)), refuse=side.pending)
    if not side.revealed and side.chance(0.3):
        return Act(reveal=stated, refuse=side.pending)
    take = side.fairest(stated, theirs)
    if tactic.lies and side.utility(take) < aspiration(side, tactic):
        return Act(take=side.proposal(aspiration(side, tactic)), refuse=side.pending)
    if side.chance(0.35):
        return Act(take=take, best=True, refuse=side.pending)
    return Act(take=take, best=True, reveal=stated, against=theirs, refuse=False)
