"""One price between a buyer and a seller whose limits are private: the game, and its scripted negotiators.

What walking away leaves a side is in its limit: a price at the limit gains nothing, one beyond it is a
loss. The zone of agreement lies between the seller's limit and the buyer's; a third of the contexts have
none, and there both do best to walk away.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ClassVar

from duologue.rollout.games.characters import TACTICS
from duologue.rollout.games.game import Measure, Outcome, Scenario, failure_shares
from duologue.rollout.games.price_words import understood, utter
from duologue.rollout.games.scripted import Act, ScriptedDialogue, Side, hold
from duologue.rollout.games.selection import (
    AGREEMENT,
    COMPARED,
    ENVY_FREE,
    MALFORMED,
    NASH_RATIO,
    NO_CLOSE,
    WALK_AWAY,
    WALKED_AWAY,
    SelectionGame,
    SelectionSettings,
    Vector,
    split_by_class,
)

LIMITS = range(5, 31)
GAPS = (*range(-6, -1), *range(2, 13))  # the buyer's limit less the seller's
MEASURES = {
    "agreement": AGREEMENT,
    "efficiency": Measure("right deals where one is possible", "{:.1%}"),
    "right_walks": Measure("walked away where none is", "{:.1%}"),
    "wrong_deals": Measure("deals worse than walking away", "{:.1%}"),
    "share_buyer": Measure("buyer's share of the surplus", "{:.3f}"),
    "share_seller": Measure("seller's share of the surplus", "{:.3f}"),
    "nash_ratio": NASH_RATIO,
}
FAILURES = {**NO_CLOSE, **MALFORMED, "mismatch": "two different prices", **WALKED_AWAY}


@dataclass(frozen=True, slots=True)
class Haggle:
    """The buyer can pay `most`, the seller take `least`; `buyer` is a side."""

    most: int
    least: int
    buyer: int

    @property
    def zone(self) -> int:
        """What there is to share; below 0, no price suits both."""
        return self.most - self.least

    def gains(self, price: int) -> tuple[int, int]:
        """What each side has over walking away."""
        bought, sold = self.most - price, price - self.least
        return (bought, sold) if self.buyer == 0 else (sold, bought)


@dataclass(frozen=True, kw_only=True)
class PriceSettings(SelectionSettings):
    """As of every game with rules, less the term of games that divide things."""

    def rules(self) -> None:
        super().rules()
        if ENVY_FREE in self.terms:
            accepted = "joint, own, nash in price, where a side has no part that the other could want"
            raise ValueError(f"game.weights = {self.weights}: accepted is {accepted}")


class PriceGame(SelectionGame):
    """The game as `duologue.rollout.games.game.Game`."""

    name = "price"
    Settings = PriceSettings
    failures = FAILURES
    measures = MEASURES
    compared = COMPARED | {
        "efficiency": replace(MEASURES["efficiency"], short="right deals"),
        "right_walks": replace(MEASURES["right_walks"], short="right walks"),
        "wrong_deals": replace(MEASURES["wrong_deals"], short="wrong deals"),
        "share_own": Measure("own share of the surplus", "{:.3f}", "share"),
        "nash_ratio": replace(NASH_RATIO, short="Nash"),
    }
    cooperative = "right"  # it leaves nothing ungained
    total = max(GAPS)
    selection_form = f"'price N' with N from 0 to 99, or '{WALK_AWAY}'"

    @cached_property
    def splits(self) -> dict[str, list[Haggle]]:
        """319 pairs of limits, each with either side as the buyer; a pair is a class."""
        pairs = [(most, least) for most in LIMITS for least in LIMITS if most - least in GAPS]
        return split_by_class(
            [Haggle(*pair, buyer) for pair in pairs for buyer in (0, 1)], lambda h: (h.most, h.least)
        )

    def scenario(self, haggle: Haggle, split: str) -> Scenario:
        name = f"price-{haggle.most}-{haggle.least}-{haggle.buyer}"
        texts = (self.private_text(haggle, 0), self.private_text(haggle, 1))
        return Scenario(game=self.name, id=name, split=split, private_text=texts, data=haggle)

    def private_text(self, haggle: Haggle, side: int) -> str:
        if side == haggle.buyer:
            return f"buy for {haggle.most} at most"
        return f"sell for {haggle.least} at least"

    def statement(self, price: int) -> str:
        """The final statement that names it."""
        return f"price {price}"

    def parse(self, text: str) -> int | None:
        """The price that a final statement names, None when it is not exactly "price " and a number from 0
        to 99.
        """
        match = re.fullmatch(r"price (0|[1-9][0-9]?)", text)
        return int(match[1]) if match else None

    def judge(self, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
        """Every outcome has the measures `zone`, whether there is one; `wrong`, whether a deal leaves a
        side worse than walking away; `right`, whether it is another deal, or a walk-away without a zone;
        `nash_ratio`, in a zone product / best product.
        """
        haggle: Haggle = scenario.data
        prices = [None, None] if finals is None else [self.parse(text) for text in finals]
        failure = _failure(finals, prices)
        gains = (0, 0) if failure or prices[0] is None else haggle.gains(prices[0])
        wrong = min(gains) < 0
        right = not failure and not wrong if haggle.zone > 0 else failure == "walk_away"
        metrics = {
            "zone": float(haggle.zone > 0),
            "wrong": float(wrong),
            "right": float(right),
            "nash_ratio": float(right),
        }
        if right and haggle.zone > 0:
            half = haggle.zone // 2
            metrics["nash_ratio"] = gains[0] * gains[1] / (half * (haggle.zone - half))
            metrics["share_buyer"] = gains[haggle.buyer] / haggle.zone
            metrics["share_seller"] = gains[1 - haggle.buyer] / haggle.zone
        scores = (float(gains[0]), float(gains[1]))
        return Outcome(agreed=not failure, scores=scores, failure=failure, metrics=metrics)

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Where there is a zone: `agreement`, deals of any kind, and `efficiency`, right ones, of all.
        Elsewhere: `right_walks` of all. `wrong_deals` of all deals. `share_*` and `nash_ratio`: means over
        right deals. Of nothing, 0.
        """
        zone = [o for o in outcomes if o.metrics["zone"]]
        right = [o for o in zone if o.metrics["right"]]
        shares = ("share_buyer", "share_seller", "nash_ratio")
        return {
            "dialogues": float(len(outcomes)),
            "agreement": _mean([o.agreed for o in zone]),
            "efficiency": _mean([o.metrics["right"] for o in zone]),
            "right_walks": _mean([o.metrics["right"] for o in outcomes if not o.metrics["zone"]]),
            "wrong_deals": _mean([o.metrics["wrong"] for o in outcomes if o.agreed]),
            **{key: _mean([o.metrics[key] for o in right]) for key in shares},
            **failure_shares(outcomes, self.failures),
        }

    def seen_from(self, scenario: Scenario, outcome: Outcome, side: int) -> dict[str, float]:
        """As `summarise`: agreement and right deals where there is a zone, right walk-aways elsewhere, wrong
        deals of all deals, shares and the Nash product of right deals.
        """
        haggle: Haggle = scenario.data
        metrics, zone = outcome.metrics, haggle.zone > 0
        seen = super().seen_from(scenario, outcome, side)
        if not zone:
            del seen["agreement"]
        seen["efficiency" if zone else "right_walks"] = metrics["right"]
        if outcome.agreed:
            seen["wrong_deals"] = metrics["wrong"]
        if zone and metrics["right"]:
            seen["share_own"] = metrics["share_buyer" if side == haggle.buyer else "share_seller"]
            seen["nash_ratio"] = metrics["nash_ratio"]
        return seen


def _failure(finals: tuple[str, str] | None, prices: Sequence[int | None]) -> str | None:
    if finals is None:
        return "no_close"
    if WALK_AWAY in finals:
        return "walk_away"
    if None in prices:
        return "malformed"
    return "mismatch" if prices[0] != prices[1] else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


# ---- scripted negotiators ----------------------------------------------------------------------------------

TEMPERAMENTS = {"open": 0.45, "fair": 0.2, "hard": 0.2, "hasty": 0.15}
ENOUGH = {"open": 3, "fair": 2, "hard": 5}  # what an offer must gain to be accepted, less one per refusal
LOSS = 4  # that hasty accepts
SPAN = 10  # what a character would like to gain
LIE = 3  # by so much a liar's limit is off


@dataclass(slots=True)
class Haggler(Side):
    """One side; its one value is its limit."""

    game: PriceGame = field(kw_only=True, default_factory=PriceGame)
    buys: bool = field(kw_only=True)

    floor: ClassVar[float] = 0.1

    def gain(self, offer: Vector) -> int:
        return (self.values[0] - offer[0]) * (1 if self.buys else -1)

    def left_by(self, take: Vector) -> Vector:
        return take

    def content(self, offer: Vector) -> bool:
        if self.temperament == "hasty":
            return self.gain(offer) >= -LOSS
        enough = ENOUGH[self.temperament]
        if self.temperament == "open" and self.theirs is not None:
            enough = self.gain(self.theirs) // 2
        return enough >= 0 and self.gain(offer) >= max(0, enough - self.refusals)

    def decide(self) -> Act:
        if self.temperament != "hasty" and (self.hopeless or (self.refusals > 2 and self.chance(0.5))):
            parting = Act(leave=True, close=True)
            return self._by_limits(parting) if self.hopeless and self.told else parting
        act: Act = getattr(self, f"_{self.temperament}")()
        return act

    def state(self) -> str:
        """The price that was agreed; without one hasty hopes for its own, and the others walk away."""
        price = self.agreed or (self.offered if self.temperament == "hasty" else None)
        return self.game.statement(price[0]) if price else self.game.left

    def _at(self, gained: int) -> Vector:
        """The price that gains so much."""
        return (max(1, self.values[0] + (-gained if self.buys else gained)),)

    def _open(self) -> Act:
        """States its limit and asks for the other's, then names the middle of both."""
        if not self.revealed and (self.theirs is None or self.chance(0.3)):
            return Act(reveal=self.values, refuse=self.pending, ask=self.theirs is None and self.chance(0.6))
        if self.theirs is not None:
            take = self._at(self.gain(self.theirs) // 2)
            if not self.told and self.chance(0.3):
                return Act(take=take, best=True, refuse=self.pending)
            return self._by_limits(Act(take=take))
        return (
            Act(take=self._at(2), refuse=self.pending) if self.pending or self.chance(0.4) else Act(ask=True)
        )

    def _by_limits(self, act: Act) -> Act:
        """With both limits, from which it follows."""
        return replace(act, reveal=self.values, against=self.theirs)

    def _fair(self) -> Act:
        """Begins a little off, then names the middle of what both have offered; states its limit when it is
        asked.
        """
        if self.last.ask and not self.revealed and self.chance(0.7):
            return Act(reveal=self.values, refuse=self.pending)
        if self.offered is None or self.offer is None:
            return Act(take=self._at(max(1, self.rng.randint(3, 6) - self.refusals)), refuse=self.pending)
        middle = max(0, (self.gain(self.offered) + self.gain(self.offer)) // 2)
        return Act(take=self._at(middle), best=True, refuse=self.chance(0.5))

    def _hard(self) -> Act:
        """Begins far off and gives in slowly."""
        return Act(take=self._at(max(1, self.rng.randint(7, 9) - 2 * self.refusals)), refuse=self.pending)

    def _hasty(self) -> Act:
        """Names any price near its limit, also one at which it loses, or closes before a deal."""
        if self.spoken and self.chance(0.3):
            return Act(close=True)
        return Act(take=self._at(self.rng.randint(1 - LOSS, 5)), refuse=self.pending and self.chance(0.3))

    def say(self, act: Act) -> str:
        if self.game.words:
            return str(self.game.words.utter(self, act))
        return utter(act, self.buys, self.rng)

    def understand(self, text: str) -> Act:
        if self.game.words:
            act: Act = self.game.words.understood(self, text)
            return act
        return understood(text, not self.buys)

    @property
    def told(self) -> bool:
        """In English, where what follows from both limits is said beside them."""
        return bool(self.game.words)

    # ---- what characters go by -----------------------------------------------------------------------------

    @property
    def hopeless(self) -> bool:
        return self.theirs is not None and self.gain(self.theirs) < 0

    def utility(self, take: Vector) -> float:
        """1 at a gain of `SPAN`."""
        return self.gain(take) / SPAN

    def proposal(self, least: float) -> Vector:
        return self._at(max(0, math.ceil(least * SPAN - 1e-9)))

    def fairest(self, mine: Vector, theirs: Vector) -> Vector:
        """The middle."""
        return ((mine[0] + theirs[0] + self.buys) // 2,)

    def claimed(self, lies: bool) -> Vector:
        return self._at(LIE) if lies else self.values


def make_side(
    game: PriceGame, scenario: Scenario, role: int, temperament: str, rng: random.Random
) -> Haggler:
    """A negotiator for a side of the scenario."""
    haggle: Haggle = scenario.data
    buys = role == haggle.buyer
    limit = (haggle.most if buys else haggle.least,)
    return Haggler(limit, temperament, rng, game=game, tactic=TACTICS.get(temperament), buys=buys)


def scripted_dialogue(
    game: PriceGame,
    scenario: Scenario,
    rng: random.Random,
    mixture: Mapping[str, float] = TEMPERAMENTS,
) -> ScriptedDialogue:
    """Two of the mixture hold the negotiation."""
    return hold(game, scenario, mixture, rng, partial(make_side, game, scenario))
