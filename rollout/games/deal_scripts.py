"""Scripted negotiators for `deal`: what a policy that starts from nothing imitates first.

Each side is a temperament. It sees the counts, its own values and what the other side's words say (an
`Act`), never the other's values. The mixture is made to be improved upon: two open sides waste nothing, the
others waste something in most of their agreements or find none, and everybody is open now and then, so that
no way of acting well is out of reach of a policy that imitates all of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import ClassVar

from duologue.rollout.games.deal import Deal, DealGame, dot, less
from duologue.rollout.games.deal_words import Language, utter
from duologue.rollout.games.game import Scenario
from duologue.rollout.games.scripted import START, Act, ScriptedDialogue, Side, hold
from duologue.rollout.games.selection import Vector

TEMPERAMENTS = {"open": 0.41, "vague": 0.13, "hard": 0.18, "splitter": 0.15, "hasty": 0.13}
# What an offer must be worth to be accepted, less one per refusal; open asks for more where it knows more.
ENOUGH = {"open": 2, "vague": 4, "hard": 8, "splitter": 3, "hasty": 0}
CANDOUR = 0.15  # how likely those that are not open act openly at a turn; twice as likely when asked


@dataclass(slots=True)
class Negotiator(Side):
    """One side. `want` and `spare` are what the other has said of its item types."""

    language: ClassVar[Language] = Language()
    game: DealGame = field(kw_only=True)
    counts: Vector = field(kw_only=True)
    want: int | None = None
    spare: int | None = None
    hinted: bool = False

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
        Side.hear(self, act)
        self.want = self.want if act.want is None else act.want
        self.spare = self.spare if act.spare is None else act.spare

    def left_by(self, take: Vector) -> Vector:
        return less(self.counts, take)

    def say(self, act: Act) -> str:
        return utter(
            act, self.counts, self.language, self.rng, told=self.theirs is not None, left=self.last.leave
        )

    def state(self) -> str:
        """What I take in the end: what was agreed, else what I would like."""
        return self.game.statement(self.agreed or self._keep_valuable())

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
            return replace(act, reveal=self.values, against=theirs) if self.chance(0.65) else act
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


def scripted_dialogue(
    game: DealGame, scenario: Scenario, rng: random.Random, kind: type[Negotiator] = Negotiator
) -> ScriptedDialogue:
    """Two temperaments hold the negotiation."""
    deal: Deal = scenario.data

    def side(i: int, temperament: str, draws: random.Random) -> Negotiator:
        return kind(deal.values[i], temperament, draws, game=game, counts=deal.counts)

    return hold(game, scenario, TEMPERAMENTS, rng, side)
