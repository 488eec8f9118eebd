"""Scripted negotiators for `deal`: what a policy that starts from nothing imitates first.

Each side is a temperament. It sees the counts, its own values and what the other side's words say (an
`Act`), never the other's values. The mixture is made to be improved upon: two open sides waste nothing, the
others waste something in most of their agreements or find none, and everybody is open now and then, so that
no way of acting well is out of reach of a policy that imitates all of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import ClassVar

from duologue.rollout.games.characters import TACTICS
from duologue.rollout.games.deal import Deal, DealGame, allocations, dot, less, value_vectors
from duologue.rollout.games.deal_words import Language, understood, utter
from duologue.rollout.games.game import Scenario
from duologue.rollout.games.scripted import START, Act, ScriptedDialogue, Side, hold
from duologue.rollout.games.selection import Vector

TEMPERAMENTS = {"open": 0.41, "vague": 0.13, "hard": 0.18, "splitter": 0.15, "hasty": 0.13}
# What an offer must be worth to be accepted, less one per refusal; open asks for more where it knows more.
ENOUGH = {"open": 2, "vague": 4, "hard": 8, "splitter": 3, "hasty": 0}
MOST_WEIGHED = 2000  # possible values of a side that a liar weighs
CANDOUR = 0.15  # how likely those that are not open act openly at a turn; twice as likely when asked


@dataclass(slots=True)
class Negotiator(Side):
    """One side. `want` and `spare` are what the other has said of its item types."""

    language: ClassVar[Language] = Language()
    game: DealGame = field(kw_only=True)
    counts: Vector = field(kw_only=True)
    role: int = field(kw_only=True, default=0)
    want: int | None = None
    spare: int | None = None
    hinted: bool = False
    lie: Vector | None = None
    stated: bool = False  # its values, in English
    wanted: list[float] = field(init=False)  # by item type: how much of it the other has asked for

    floor: ClassVar[float] = 0.3

    def __post_init__(self) -> None:
        self.wanted = [0.5] * len(self.counts)

    def decide(self) -> Act:
        if self.last.leave and not self.pending and self.chance(0.6):
            act = Act(leave=True)
        elif self.temperament != "open" and self.chance(2 * CANDOUR if self.last.ask else CANDOUR):
            act = self._candid()
        else:
            act = getattr(self, f"_{self.temperament}")()
        self.hinted |= act.want is not None or act.spare is not None
        return act

    def hear(self, act: Act) -> None:
        for k, taken in enumerate(act.take or ()):
            self.wanted[k] += taken / self.counts[k]
        Side.hear(self, act)
        self.want = self.want if act.want is None else act.want
        self.spare = self.spare if act.spare is None else act.spare

    def left_by(self, take: Vector) -> Vector:
        return less(self.counts, take)

    def say(self, act: Act) -> str:
        if self.game.words:
            return str(self.game.words.utter(self, act))
        return utter(
            act, self.counts, self.language, self.rng, told=self.theirs is not None, left=self.last.leave
        )

    def understand(self, text: str) -> Act:
        """Values that nobody can have are garbled ones."""
        if self.game.words:
            act: Act = self.game.words.understood(self, text)
        else:
            act = understood(text, self.counts, self.language)
        credible = act.reveal is None or self.credible(act.reveal)
        return act if credible else replace(act, reveal=None, against=None)

    def state(self) -> str:
        """What I take in the end: what was agreed, else what I would like."""
        wished = self.offered or self.counts if self.tactic else self._keep_valuable()
        return self.game.statement(self.agreed or wished)

    def _worth(self, take: Vector) -> int:
        return dot(self.values, take)

    def content(self, offer: Vector) -> bool:
        """Open wants the best joint deal if it can see it, and else to have been understood."""
        theirs, enough = self.theirs, self._worth(offer) >= ENOUGH[self.temperament] - self.refusals
        if self.temperament != "open":
            return enough
        if theirs is None:
            return self.revealed and enough
        best = self._joint(self._joint_best(theirs), theirs)
        return self._joint(offer, theirs) == best or (self.refusals > 0 and enough)

    # ---- what to say when the other's offer, if there is one, is not accepted ------------------------------

    def _candid(self) -> Act:
        """The open thing to do next: offer the best joint deal, or state the values, or ask."""
        theirs = self.theirs
        if theirs is not None and (self.revealed or not (self.last.ask or self.chance(0.3))):
            act = Act(take=self._joint_best(theirs), refuse=self.pending, best=True)
            compares = self.game.words or self.chance(0.65)  # in English the numbers are always named
            return replace(act, reveal=self.values, against=theirs) if compares else act
        if not self.revealed:
            refuse = self.pending and self.chance(0.6)
            ask = theirs is None and not refuse and self.chance(0.5)
            return Act(reveal=self.values, refuse=refuse, ask=ask)
        return Act(ask=True, refuse=self.pending)

    def _open(self) -> Act:
        """Candid; a question that stays unanswered is followed by an offer on what little is known."""
        if self.theirs is None and not self.pending and self.spoken == 0 and self.chance(0.12):
            return Act(ask=True)
        if self.theirs is None and self.asked and self.revealed:
            return Act(take=self._keep_valuable(), refuse=self.pending)
        return self._candid()

    def _vague(self) -> Act:
        """Says what it likes most or can spare, and offers on hints alone."""
        if self.refusals > 1 and self.chance(0.3):
            return Act(leave=True)
        if not self.hinted and self.chance(0.85):
            spare, ask = self._least(), self.chance(0.4)
            if not self.pending and self.values[spare] < 2 and self.chance(0.4):
                return Act(spare=spare, ask=ask)
            return Act(want=self._favourite(), ask=ask, refuse=self.pending)
        return Act(take=self._keep_valuable(), refuse=self.pending)

    def _hard(self) -> Act:
        """Asks for nearly everything, gives in slowly, and leaves when it has refused enough."""
        if self.chance((0.0, 0.4, 0.8)[min(self.refusals, 2)]):
            return Act(leave=True)
        reason = self._favourite() if self.chance(0.4) else None
        if not self.pending and reason is not None and not self.hinted:
            return Act(want=reason)
        return Act(take=self._demand(), refuse=self.pending, want=reason if self.pending else None)

    def _splitter(self) -> Act:
        """Halves everything without asking."""
        if self.refusals > 1 and self.chance(0.3):
            return Act(leave=True)
        return Act(take=self._half(), refuse=self.pending)

    def _hasty(self) -> Act:
        """Offers what comes to mind, or closes before there is a deal. It accepts whatever it is
        offered.
        """
        if (self.spoken or self.last is not START) and self.chance(0.4):
            return Act(close=True)
        mine = self._favourite()
        return Act(take=tuple(c if k == mine else self.rng.randint(0, c) for k, c in enumerate(self.counts)))

    # ---- what characters go by -----------------------------------------------------------------------------

    def credible(self, values: Vector) -> bool:
        """Whether a side can have these."""
        return dot(self.counts, values) == self.game.total

    def possible(self) -> tuple[Vector, ...]:
        """Values that a side can have."""
        return possible_values(self.counts, self.game.total)

    def utility(self, take: Vector) -> float:
        return self._worth(take) / self.game.total

    def proposal(self, least: float) -> Vector:
        """Of the allocations with that utility one that leaves the other side most: by its values, or by
        what it has asked for.
        """
        weights: Sequence[float] = self.theirs or self.wanted
        points = least * self.game.total - 1e-9
        ranked = [
            (-sum(w * n for w, n in zip(weights, take, strict=True)), worth, take)
            for worth, take in valued(self.counts, self.values)
            if worth >= points
        ]
        most = max(ranked)[:2]
        return self.rng.choice([take for *rank, take in ranked if tuple(rank) == most])

    def fairest(self, mine: Vector, theirs: Vector) -> Vector:
        """The largest joint score, then the largest product; of equals the one that leaves the other more."""
        deal = Deal(self.counts, (mine, theirs))

        def rank(take: Vector) -> tuple[int, int, int, Vector]:
            first, second = deal.scores(take)
            return first + second, first * second, -first, take

        return max(allocations(self.counts), key=rank)

    def claimed(self, lies: bool) -> Vector:
        """A liar's are those that win it most where each type goes to whom it is worth more; once it has
        stated some, it stays with them.
        """
        if not lies:
            return self.values
        if self.lie is None:
            self.lie = best_lie(self.counts, self.values, self.theirs, self.possible())
        return self.lie

    # ---- allocations ---------------------------------------------------------------------------------------

    def _joint_best(self, theirs: Vector) -> Vector:
        """Each type goes to whom it is worth more; what is worth the same to both is theirs."""
        each = zip(self.counts, self.values, theirs, strict=True)
        return tuple(c if mine > other else 0 for c, mine, other in each)

    def _joint(self, take: Vector, theirs: Vector) -> int:
        return sum(Deal(self.counts, (self.values, theirs)).scores(take))

    def _favourite(self) -> int:
        return max(range(len(self.counts)), key=lambda k: (self.values[k] * self.counts[k], -k))

    def _least(self) -> int:
        return min(range(len(self.counts)), key=lambda k: (self.values[k], k))

    def _half(self) -> Vector:
        """Half of each type; the odd ones go here and there in turn."""
        up = self.chance(0.5)
        half = []
        for c in self.counts:
            half.append((c + up) // 2)
            up ^= c % 2 == 1
        return tuple(half)

    def _keep_valuable(self) -> Vector:
        """My favourite type, what they can spare, nothing of what they want, and half of the rest."""
        mine, take = self._favourite(), list(self._half())
        for k, c in enumerate(self.counts):
            if k == mine or (k == self.spare and self.values[k]):
                take[k] = c
            elif k == self.want:
                take[k] = 0
        return tuple(take)

    def _demand(self) -> Vector:
        """Everything but an item or two, one more of them with each refusal, and nothing of my favourite
        type.
        """
        mine = self._favourite()
        others = [k for k, c in enumerate(self.counts) if k != mine for _ in range(c)]
        spared = self.rng.sample(others, min(len(others), self.refusals + 1))
        return tuple(c - spared.count(k) for k, c in enumerate(self.counts))


@lru_cache(1 << 12)
def valued(counts: Vector, values: Vector) -> tuple[tuple[int, Vector], ...]:
    """Everything that a side can take, after what it is worth."""
    return tuple((dot(values, take), take) for take in allocations(counts))


@cache
def possible_values(counts: Vector, total: int) -> tuple[Vector, ...]:
    """Values of a side with that total; of very many, some."""
    vectors = value_vectors(counts, total)
    return vectors[:: 1 + len(vectors) // MOST_WEIGHED]


@cache
def best_lie(counts: Vector, values: Vector, theirs: Vector | None, possible: tuple[Vector, ...]) -> Vector:
    """The others of the `possible` values for which each type's going to whom it is worth more would give
    most by the true `values`: given the other side's, else for all that it may have; of equals the nearest
    to the truth.
    """
    others = possible if theirs is None else (theirs,)

    @cache
    def won(k: int, value: int) -> float:
        return sum(other[k] < value for other in others) / len(others)

    def rank(lie: Vector) -> tuple[float, int, Vector]:
        shares = [won(k, value) for k, value in enumerate(lie)]
        gained = sum(n * v * share for n, v, share in zip(counts, values, shares, strict=True))
        return gained, -sum(abs(a - b) for a, b in zip(lie, values, strict=True)), lie

    return max((lie for lie in possible if lie != values), key=rank, default=values)


def make_side(
    game: DealGame,
    scenario: Scenario,
    role: int,
    temperament: str,
    rng: random.Random,
    kind: type[Negotiator] = Negotiator,
) -> Negotiator:
    """A negotiator for a side of the scenario."""
    deal: Deal = scenario.data
    tactic = TACTICS.get(temperament)
    return kind(deal.values[role], temperament, rng, tactic=tactic, game=game, counts=deal.counts, role=role)


def scripted_dialogue(
    game: DealGame,
    scenario: Scenario,
    rng: random.Random,
    kind: type[Negotiator] = Negotiator,
    mixture: Mapping[str, float] = TEMPERAMENTS,
) -> ScriptedDialogue:
    """Two of the mixture hold the negotiation."""
    return hold(game, scenario, mixture, rng, partial(make_side, game, scenario, kind=kind))
