"""Games with rules: both talk until one closes, then each states its selection, and the rules score the two.

A talk ends with `CLOSE`; in games that allow it a side can state `WALK_AWAY` instead, which one alone can do.
"""

# ruff: noqa: RUF009 - Shares cannot be changed

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from duologue.model.settings import Shares, setting
from duologue.rollout.games.game import Game, GameSettings, Measure, Outcome, Scenario

CLOSE = "<selection>"
WALK_AWAY = "walk away"
JOINT, OWN, NASH, ENVY_FREE = "joint", "own", "nash", "envy_free"  # terms of a reward
OBJECTIVES = {"cooperative": Shares({JOINT: 1}), "nash": Shares({NASH: 1}), "selfish": Shares({OWN: 1})}
MIXED, UNMIXED = "mixed", Shares()
HELDOUT_SHARE = 0.2
UNCLEAR = ("malformed", "out_of_range")  # of a selection on its own
NO_CLOSE = {"no_close": "the talk ended without a close"}
MALFORMED = {"malformed": "a selection could not be read"}
WALKED_AWAY = {"walk_away": "walked away"}
AGREEMENT = Measure("agreement", "{:.1%}", "agreed")
NASH_RATIO = Measure("Nash product / best", "{:.3f}")
COMPARED = {
    "agreement": AGREEMENT,
    "own": Measure("own score", "{:.2f}", "own"),
    "partner": Measure("partner's score", "{:.2f}", "partner"),
    "lead": Measure("own less partner's", "{:.2f}"),
}

Vector = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SelectionSettings(GameSettings):
    """Of a game that has rules: what both sides are to maximise. Terms of a reward: "joint", for both sides
    the joint score / the best (in price 1 for what is right); "own", a side's own points / the total, without
    a deal its walk-away value; "nash", for both the product of their scores / the best; "envy_free", of games
    that divide things, 1 for a side that would not change its part for the other's (Foley 1967), nor has
    reason to without a deal. cooperative is joint alone, selfish own, nash nash.
    """

    objective: str = setting("cooperative", "what a side's reward is made of", one_of=(*OBJECTIVES, MIXED))
    weights: Shares = setting(
        UNMIXED,
        "of the terms, with objective 'mixed' alone, e.g. {joint = 0.5, own = 0.25, nash = 0.25}",
        one_of=(JOINT, OWN, NASH, ENVY_FREE),
    )

    @property
    def terms(self) -> dict[str, float]:
        """The weights of a reward's terms, which add up to 1."""
        return OBJECTIVES.get(self.objective, self.weights).parts

    telling: str = setting(
        "plain",
        "how sides are told the game: 'english' in sentences, where nothing is said for a model.path",
        one_of=("plain", "english"),
    )

    def rules(self) -> None:
        if self.objective == MIXED and not self.weights:
            accepted = "a table of weights with game.objective = 'mixed'"
            raise ValueError(f"game.weights = {self.weights}: accepted is {accepted}")


class SelectionGame(Game):
    """The parts of a game with rules that do not depend on what is negotiated."""

    protocol = "negotiation"
    Settings = SelectionSettings
    settings: SelectionSettings
    final_prompt = "selection ?"  # what both sides are asked once the talk is closed
    final_form = "policy states> {}"
    stated = "selects"
    compared = COMPARED
    cooperative: ClassVar[str]  # the measure of an outcome that is the reward under that objective
    total: int  # the most points of a side
    walk_away: float = 0.0  # points of a side without a deal
    words: ClassVar[Any] = None  # of scripted negotiators, where they do not speak the plain telling's
    left = WALK_AWAY  # the statement of a side that gives up
    close = CLOSE  # what an utterance that closes the talk ends with

    @cached_property
    @abstractmethod
    def splits(self) -> dict[str, list[Any]]: ...  # contexts of "train" and "heldout"
    @abstractmethod
    def scenario(self, context: Any, split: str) -> Scenario: ...  # as the two sides are told it

    def decisive(self, text: str) -> list[tuple[int, int]]:
        """Where words of a script's turn begin and end on which depends what comes next."""
        return []

    @abstractmethod
    def judge(self, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
        """Score the two final statements; None means that the talk ended without a close."""

    def sample(self, rng: random.Random, split: str) -> Scenario:
        if split not in self.splits:
            raise ValueError(f"split = {split!r}: accepted is one of {', '.join(self.splits)}")
        return self.scenario(rng.choice(self.splits[split]), split)

    def rewards(self, scenario: Scenario, outcome: Outcome) -> tuple[float, float]:
        """For each side the weighted sum of the terms of its objective: measures of the outcome for both, 0
        where it has none, and its own points / total; no deal leaves the walk-away value, more than a bad
        deal. What a side has not got is worth the rest of the total to it.
        """
        points = outcome.scores if outcome.agreed else (self.walk_away, self.walk_away)
        joint, nash = (outcome.metrics.get(key, 0.0) for key in (self.cooperative, "nash_ratio"))
        even = [not outcome.agreed or 2 * own >= self.total for own in points]
        sides = [
            {JOINT: joint, OWN: own / self.total, NASH: nash, ENVY_FREE: float(calm)}
            for own, calm in zip(points, even, strict=True)
        ]
        first, second = (
            sum(weight * side[term] for term, weight in self.settings.terms.items()) for side in sides
        )
        return first, second

    def seen_from(self, scenario: Scenario, outcome: Outcome, side: int) -> dict[str, float]:
        """Agreement, and the points of both sides, those of a failed deal among them."""
        own, partner = outcome.scores[side], outcome.scores[1 - side]
        return {"agreement": float(outcome.agreed), "own": own, "partner": partner, "lead": own - partner}

    def closes(self, text: str) -> bool:
        """Whether this utterance ends the talk, after which both sides state their selection."""
        return text.endswith(CLOSE)

    # ---- for people ----------------------------------------------------------------------------------------

    @property
    def ending(self) -> str:  # type: ignore[override]
        return (
            f"To close the talk, end what you say with {self.close}; then both state a selection: "
            f"{self.selection_form}."
        )

    def can_state(self, scenario: Scenario, text: str) -> bool:
        return self.judge(scenario, (text, text)).failure not in UNCLEAR

    def result(self, outcome: Outcome, side: int) -> str:
        end = "Agreed" if outcome.agreed else f"No deal ({outcome.failure})"
        return f"{end}: you score {outcome.scores[side]:g}, the policy {outcome.scores[1 - side]:g}."


def split_by_class(contexts: Sequence[Any], class_of: Callable[[Any], Any]) -> dict[str, list[Any]]:
    """The classes, which must have an order, are dealt out by a fixed shuffle; a fifth is held out."""
    classes = sorted({class_of(context) for context in contexts})
    random.Random(0).shuffle(classes)
    heldout = set(classes[: round(HELDOUT_SHARE * len(classes))])
    split: dict[str, list[Any]] = {"train": [], "heldout": []}
    for context in contexts:
        split["heldout" if class_of(context) in heldout else "train"].append(context)
    return split
