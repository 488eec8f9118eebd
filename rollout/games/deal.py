"""Deal-or-No-Deal: two sides divide a few items that they value differently (Lewis et al. 2017, arXiv
1706.05125).

Contexts are generated. Each side sees the counts and its own values; each side's values add up to the same
total. Every type is worth something to somebody, and at least one type to both. Contexts that differ only
in the order of the items or in who sits where form a class, and the train / held-out split goes by class:
held-out ones have no twin in training.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import ClassVar

from duologue.model.settings import setting
from duologue.rollout.games.game import (
    GameSettings,
    Measure,
    Outcome,
    Published,
    Scenario,
    failure_shares,
)
from duologue.rollout.games.selection import (
    AGREEMENT,
    COMPARED,
    MALFORMED,
    NASH_RATIO,
    NO_CLOSE,
    OWN,
    SelectionGame,
    SelectionSettings,
    Vector,
    split_by_class,
)

ITEMS = ("book", "hat", "ball", "pen", "cup")
FAILURES = {
    **NO_CLOSE,
    **MALFORMED,
    "out_of_range": "a selection took more than there is",
    "conflict": "both took the same item",
    "leftover": "items were left over",
}
MEASURES = {
    "agreement": AGREEMENT,
    "pareto": Measure("Pareto-optimal among agreed", "{:.1%}", "Pareto"),
    "joint_ratio": Measure("joint score / best joint", "{:.3f}", "joint"),
    "nash_ratio": NASH_RATIO,
    "score_agreed_0": Measure("score of side 1, agreed", "{:.2f}"),
    "score_agreed_1": Measure("score of side 2, agreed", "{:.2f}"),
}
DIVISION = {  # what is measured of an agreed deal
    "pareto": MEASURES["pareto"],
    "joint_ratio": MEASURES["joint_ratio"],
    "nash_ratio": replace(NASH_RATIO, short="Nash"),
}
PUBLISHED = Published(  # of three types and a total of 10
    columns={
        "people": {"agreement": 0.801, "pareto": 0.770, "joint_ratio": 0.950, "nash_ratio": 0.914},
        "random split": {"pareto": 0.230, "joint_ratio": 0.680, "nash_ratio": 0.368},
    },
    source="People: Lewis et al. 2017, on that paper's own contexts. Random split: every allocation equally "
    "likely, computed.",
)
MOST_LISTED = 200_000  # pairs of value vectors up to which a variant is enumerated
POOL = 20_000  # contexts drawn for a larger one


def dot(a: Vector, b: Vector) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))


def less(counts: Vector, take: Vector) -> Vector:
    """What is left of `counts`."""
    return tuple(c - t for c, t in zip(counts, take, strict=True))


@cache
def allocations(counts: Vector) -> tuple[Vector, ...]:
    """Everything that a side can take."""
    return tuple(itertools.product(*(range(count + 1) for count in counts)))


@dataclass(frozen=True, slots=True)
class Deal:
    """`counts[k]` items of type k; `values[side][k]` is what one of them is worth to a side."""

    counts: Vector
    values: tuple[Vector, Vector]

    def scores(self, take: Vector) -> tuple[int, int]:
        """Points of both sides when side 0 takes `take` and side 1 the rest."""
        return dot(self.values[0], take), dot(self.values[1], less(self.counts, take))

    def allocations(self) -> list[Vector]:
        """Everything that side 0 can take."""
        return list(allocations(self.counts))


@dataclass(frozen=True, slots=True)
class Frontier:
    """What the best allocations of a deal reach."""

    best_joint: int
    best_nash: int
    pareto: frozenset[tuple[int, int]]  # the score pairs that nothing dominates
    nash_point: tuple[int, int]  # largest product, then larger sum, then smaller gap


def frontier(deal: Deal) -> Frontier:
    """By enumeration of all allocations."""
    points = {deal.scores(take) for take in deal.allocations()}
    pareto = frozenset(p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points))
    nash_point = max(points, key=lambda p: (p[0] * p[1], p[0] + p[1], -abs(p[0] - p[1])))
    return Frontier(max(a + b for a, b in points), nash_point[0] * nash_point[1], pareto, nash_point)


def count_vectors(types: int = 3) -> list[Vector]:
    """1 to 4 of each type; two to each type, or up to two more, in all, and 5 to 7 of three types."""
    fewest, most = (5, 7) if types == 3 else (2 * types, 2 * types + 2)
    return [c for c in itertools.product(range(1, 5), repeat=types) if fewest <= sum(c) <= most]


@cache
def value_vectors(counts: Vector, total: int) -> tuple[Vector, ...]:
    """Non-negative integer values per item for which everything together is worth `total`."""
    if len(counts) == 1:
        return ((total // counts[0],),) if total % counts[0] == 0 else ()
    head, tail = counts[0], counts[1:]
    return tuple(
        (v, *rest) for v in range(total // head + 1) for rest in value_vectors(tail, total - head * v)
    )


def contexts(types: int = 3, total: int = 10) -> list[Deal]:
    """Every ordered context of the game (5,295 for three types and a total of 10)."""
    deals = []
    for counts in count_vectors(types):
        vectors = value_vectors(counts, total)
        deals += [Deal(counts, (a, b)) for a in vectors for b in vectors if _worth_talking((a, b))]
    return deals


def draw_contexts(types: int, total: int, n: int, seed: int) -> list[Deal]:
    """Up to `n` different ones of `contexts`, drawn evenly without listing them: four types have millions.
    Fewer than `n` only when hardly any pair of values is a context.
    """
    rng = random.Random(seed)
    choices = [(counts, value_vectors(counts, total)) for counts in count_vectors(types)]
    weights = list(itertools.accumulate(len(v) ** 2 for _, v in choices))
    drawn: dict[Deal, None] = {}
    for _ in range(20 * n):
        if len(drawn) == n:
            break
        counts, vectors = rng.choices(choices, cum_weights=weights)[0]
        pair = (rng.choice(vectors), rng.choice(vectors))
        if _worth_talking(pair):
            drawn[Deal(counts, pair)] = None
    return list(drawn)


def _worth_talking(pair: tuple[Vector, Vector]) -> bool:
    """Every type is worth something to a side, and one type to both."""
    worths = list(zip(*pair, strict=True))
    return all(a or b for a, b in worths) and any(a and b for a, b in worths)


def class_of(deal: Deal) -> tuple[Vector, ...]:
    """The same for all contexts that differ only in item order and seats."""
    first = sorted(zip(deal.counts, deal.values[0], deal.values[1], strict=True))
    second = sorted(zip(deal.counts, deal.values[1], deal.values[0], strict=True))
    return tuple(min(first, second))


@dataclass(frozen=True, kw_only=True)
class DealSettings(SelectionSettings):
    """How many types of items there are, what they are worth, and what no deal is worth."""

    walk_away: float = setting(0.0, "points of a side without a deal, where its own points count")
    item_types: int = setting(3, "types of items", least=3, most=len(ITEMS))
    total_value: int = setting(10, "what all items are worth to a side", least=5, most=40)

    def rules(self) -> None:
        super().rules()
        accepted = ""
        if self.walk_away and OWN not in self.terms:
            selfish = "game.objective = 'selfish', or 'mixed' with own points,"
            accepted = f"0, or with {selfish} up to the total {self.total_value}"
        elif not 0 <= self.walk_away <= self.total_value:
            accepted = f"0 to the total value {self.total_value}"
        if accepted:
            raise ValueError(f"game.walk_away = {self.walk_away}: accepted is {accepted}")


class DealGame(SelectionGame):
    """The game as `duologue.rollout.games.game.Game`: contexts, texts, strict parsing, scores."""

    name = "deal"
    Settings: ClassVar[type[SelectionSettings]] = DealSettings
    measures = MEASURES
    compared = COMPARED | DIVISION
    failures = FAILURES
    cooperative = "joint_ratio"

    def __init__(self, settings: DealSettings | None = None) -> None:
        settings = settings or DealSettings()
        super().__init__(settings)
        self._prepare(ITEMS[: settings.item_types], settings.total_value, settings.walk_away)

    def _prepare(self, items: tuple[str, ...], total: int, walk_away: float) -> None:
        self.items, self.total, self.walk_away = items, total, walk_away
        self._statement = re.compile(" ".join(f"{item} (0|[1-9][0-9]{{0,3}})" for item in self.items))
        self._frontiers: dict[Deal, Frontier] = {}

    @cached_property
    def splits(self) -> dict[str, list[Deal]]:
        """Contexts of "train" and "heldout"; the classes are dealt out by a fixed shuffle. A variant too
        large to list is represented by a fixed draw of `POOL` contexts.
        """
        types, total = len(self.items), self.total
        pairs = sum(len(value_vectors(counts, total)) ** 2 for counts in count_vectors(types))
        everything = contexts(types, total) if pairs <= MOST_LISTED else draw_contexts(types, total, POOL, 0)
        return split_by_class(everything, class_of)

    def frontier(self, deal: Deal) -> Frontier:
        if deal not in self._frontiers:
            self._frontiers[deal] = frontier(deal)
        return self._frontiers[deal]

    # ---- the Game interface --------------------------------------------------------------------------------

    def scenario(self, deal: Deal, split: str) -> Scenario:
        first, second = (self.private_text(deal, side) for side in (0, 1))
        numbers = "-".join(".".join(map(str, v)) for v in (deal.counts, *deal.values))
        return Scenario(
            game=self.name, id=f"{self.name}-{numbers}", split=split, private_text=(first, second), data=deal
        )

    def private_text(self, deal: Deal, side: int) -> str:
        parts = zip(deal.counts, self.items, deal.values[side], strict=True)
        return " , ".join(f"{c} {item} worth {v}" for c, item, v in parts)

    def statement(self, take: Sequence[int]) -> str:
        """The final statement that takes these."""
        return " ".join(f"{item} {n}" for item, n in zip(self.items, take, strict=True))

    @property
    def selection_form(self) -> str:  # type: ignore[override]
        return f"'{' '.join(f'{item} N' for item in self.items)}', what you take of each"

    def parse(self, text: str) -> Vector | None:
        """What a final statement takes, or None when it is not exactly of the form of `statement`."""
        match = self._statement.fullmatch(text)
        return tuple(int(n) for n in match.groups()) if match else None

    def judge(self, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
        deal: Deal = scenario.data
        takes = [None, None] if finals is None else [self.parse(text) for text in finals]
        failure = _failure(deal, finals, takes)
        if failure is not None or takes[0] is None:
            return Outcome(agreed=False, scores=(0.0, 0.0), failure=failure)
        points, best = deal.scores(takes[0]), self.frontier(deal)
        metrics = {
            "pareto": float(points in best.pareto),
            "joint_ratio": sum(points) / best.best_joint,
            "nash_ratio": points[0] * points[1] / best.best_nash,
        }
        return Outcome(agreed=True, scores=(float(points[0]), float(points[1])), metrics=metrics)

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Means over dialogues. `agreement` and `failure_*` are shares of all. `pareto`, `joint_ratio`,
        `nash_ratio` and `score_agreed_*` are over the agreed, 0 when none agreed. `score_*` and `joint_all`
        are over all, where a failed deal counts 0.
        """
        n = max(len(outcomes), 1)
        agreed = [o for o in outcomes if o.agreed]
        m = max(len(agreed), 1)
        return {
            "dialogues": float(len(outcomes)),
            "agreement": len(agreed) / n,
            **{key: sum(o.metrics[key] for o in agreed) / m for key in DIVISION},
            "joint_all": sum(o.metrics["joint_ratio"] for o in agreed) / n,
            **{f"score_{side}": sum(o.scores[side] for o in outcomes) / n for side in (0, 1)},
            **{f"score_agreed_{side}": sum(o.scores[side] for o in agreed) / m for side in (0, 1)},
            **failure_shares(outcomes, self.failures),
        }

    def seen_from(self, scenario: Scenario, outcome: Outcome, side: int) -> dict[str, float]:
        division = {key: outcome.metrics[key] for key in DIVISION} if outcome.agreed else {}
        return super().seen_from(scenario, outcome, side) | division

    @classmethod
    def published(cls, settings: GameSettings) -> Published:
        same = isinstance(settings, DealSettings) and settings.item_types == 3 and settings.total_value == 10
        return PUBLISHED if same else Published()

    @classmethod
    def in_words(cls, name: str, value: float) -> str:
        if name == "pareto":
            return "Pareto-optimal" if value == 1 else "not Pareto-optimal"
        return super().in_words(name, value)


def _failure(deal: Deal, finals: tuple[str, str] | None, takes: Sequence[Vector | None]) -> str | None:
    """The kind of a failed deal, None when the two statements fit."""
    if finals is None:
        return "no_close"
    if takes[0] is None or takes[1] is None:
        return "malformed"
    if any(n > c for take in takes if take for n, c in zip(take, deal.counts, strict=True)):
        return "out_of_range"
    sums = [a + b for a, b in zip(takes[0], takes[1], strict=True)]
    if any(s > c for s, c in zip(sums, deal.counts, strict=True)):
        return "conflict"
    return "leftover" if sums != list(deal.counts) else None
