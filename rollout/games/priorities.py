"""Two campers share three packages each of food, water and firewood, with private priorities (CaSiNo,
Chawla et al. 2021, arXiv 2103.15721; rules only), and may walk away.

It is a deal with fixed counts. A side's values are 5, 4 and 3 in its own order, so what two sides are to
each other is one of five classes: how the orders compare. Held out is the one in which the sides rank no
type alike; in training at least one type is.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cached_property

from duologue.rollout.games.deal import FAILURES, Deal, DealGame, allocations
from duologue.rollout.games.deal_scripts import ENOUGH, Negotiator
from duologue.rollout.games.deal_words import Language
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.games.scripted import Act
from duologue.rollout.games.selection import (
    WALK_AWAY,
    WALKED_AWAY,
    SelectionGame,
    SelectionSettings,
    Vector,
)

PACKAGES = (3, 3, 3)
ITEMS = ("food", "water", "firewood")
RANKS = {5: "high", 4: "medium", 3: "low"}
TOTAL = sum(3 * value for value in RANKS)
ALONE = 5  # points of a side when somebody walks away


class PrioritiesGame(DealGame):
    """The game as `duologue.rollout.games.game.Game`."""

    name = "priorities"
    Settings = SelectionSettings
    failures = FAILURES | WALKED_AWAY

    @property
    def selection_form(self) -> str:  # type: ignore[override]
        return f"{super().selection_form}, or '{WALK_AWAY}'"

    def __init__(self, settings: SelectionSettings | None = None) -> None:
        SelectionGame.__init__(self, settings)
        self._prepare(ITEMS, TOTAL, ALONE)

    @cached_property
    def splits(self) -> dict[str, list[Deal]]:
        split: dict[str, list[Deal]] = {"train": [], "heldout": []}
        for first, second in itertools.product(itertools.permutations(RANKS), repeat=2):
            alike = any(a == b for a, b in zip(first, second, strict=True))
            split["train" if alike else "heldout"].append(Deal(PACKAGES, (first, second)))
        return split

    def private_text(self, deal: Deal, side: int) -> str:
        return " , ".join(
            f"{item} {RANKS[value]}" for item, value in zip(self.items, deal.values[side], strict=True)
        )

    def judge(self, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
        """A walk-away, which must be stated, has measures too and so a small reward; other failures have
        none.
        """
        if finals is None or WALK_AWAY not in finals:
            return super().judge(scenario, finals)
        best = self.frontier(scenario.data)
        metrics = {
            "pareto": 0.0,
            "joint_ratio": 2 * ALONE / best.best_joint,
            "nash_ratio": ALONE**2 / best.best_nash,
        }
        return Outcome(
            agreed=False, scores=(float(ALONE), float(ALONE)), failure="walk_away", metrics=metrics
        )


class Camper(Negotiator):
    """Who is open looks for the largest product of both scores, and who leaves walks away."""

    language = Language(items=ITEMS, plural="", ranks=RANKS, frames=(("", ""), ("", ""), ("the ", "is ")))

    def content(self, offer: Vector) -> bool:
        floor = (ENOUGH[self.temperament] - self.refusals) * TOTAL / 10
        if self.temperament == "open":
            if self.theirs is None and not self.revealed:
                return False
            if self.theirs is not None:
                floor = self._worth(self._joint_best(self.theirs)) - 4 * self.refusals
        return self._worth(offer) >= floor

    def decide(self) -> Act:
        act = super().decide()
        return replace(act, close=True) if act.leave else act

    def state(self) -> str:
        """What was agreed; without that hasty states what it would like, and the others walk away."""
        return super().state() if self.agreed or self.temperament == "hasty" else self.game.left

    def _joint_best(self, theirs: Vector) -> Vector:
        return self.fairest(self.values, theirs)

    def fairest(self, mine: Vector, theirs: Vector) -> Vector:
        """The largest product, then the largest joint score; of equals the one that is better for the other
        side, as a courtesy.
        """
        deal = Deal(self.counts, (mine, theirs))

        def rank(take: Vector) -> tuple[int, int, int, Vector]:
            first, second = deal.scores(take)
            return first * second, first + second, -first, take

        return max(allocations(self.counts), key=rank)

    def credible(self, values: Vector) -> bool:
        return values in self.possible()

    def possible(self) -> tuple[Vector, ...]:
        return tuple(itertools.permutations(RANKS))
