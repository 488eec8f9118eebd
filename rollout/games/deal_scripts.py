"""Scripted negotiators for `deal`: what a policy that starts from nothing imitates first.

Each side is a temperament. It sees the counts, its own values and what the other side's words say (an `Act`), never
the other's values. The mixture is made to be improved upon: two open sides waste nothing, the others waste something in
most of their agreements or find none, and everybody is open now and then, so that no way of acting well is out of reach
of a policy that imitates all of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from duologue.rollout.games.deal import Deal, DealGame, Vector
from duologue.rollout.games.deal_words import Act, utter
from duologue.rollout.selfplay.scenario import Outcome, Scenario

TEMPERAMENTS = {"open": 0.41, "vague": 0.13, "hard": 0.18, "splitter": 0.15, "hasty": 0.13}
MAX_UTTERANCES = 9
# What an offer must be worth to be accepted, less one per refusal; open asks for more where it knows more.
ENOUGH = {"open": 2, "vague": 4, "hard": 8, "splitter": 3, "hasty": 0}
CANDOUR = 0.15  # how likely those that are not open act openly at a turn; twice as likely when asked


@dataclass(slots=True)
class Heard:
    """What one side has learned from the other's words: for good, and from its last utterance."""

    values: Vector | None = None
    want: int | None = None
    spare: int | None = None
    last: Act = field(default_factory=Act)
    offer: Vector | None = None  # what the last utterance would leave me

    def hear(self, act: Act, counts: Vector) -> None:
        self.values = act.reveal or self.values
        self.want = self.want if act.want is None else act.want
        self.spare = self.spare if act.spare is None else act.spare
        self.last = act
        self.offer = None if act.take is None else tuple(c - t for c, t in zip(counts, act.take, strict=True))


@dataclass(kw_only=True, slots=True)
class ScriptedDialogue:
    """`turns` are (side, text, kind) with kind "utterance" or "final"."""

    scenario: Scenario
    first_speaker: int
    temperaments: tuple[str, str]
    turns: list[tuple[int, str, str]]
    outcome: Outcome


@dataclass(slots=True)
class Negotiator:
    """One side. `act` decides from what it has heard and said alone."""

    counts: Vector
    values: Vector
    temperament: str
    rng: random.Random
    heard: Heard = field(default_factory=Heard)
    spoken: int = 0
    revealed: bool = False
    hinted: bool = False
    asked: bool = False
    refusals: int = 0
    offered: Vector | None = None  # my last offer: what I would take
    agreed: Vector | None = None  # what I take, once we agree

    def act(self) -> Act:
        """The next utterance."""
        heard = self.heard
        if heard.last.accept:
            self.agreed = self.offered
            act = Act(confirm=True, close=True)
        elif heard.offer is not None and self._content(heard.offer):
            self.agreed = heard.offer
            late = 2 * self.spoken + 2 >= MAX_UTTERANCES
            act = Act(accept=True, close=late or (self.spoken > 0 and self._chance(0.65)))
        elif heard.last.leave and (self.heard.offer is None and self._chance(0.6)):
            act = Act(leave=True)
        elif self.temperament != "open" and self._chance(2 * CANDOUR if heard.last.ask else CANDOUR):
            act = self._candid()
        else:
            act = getattr(self, f"_{self.temperament}")()
        self.spoken += 1
        self.revealed |= act.reveal is not None
        self.hinted |= act.want is not None or act.spare is not None
        self.asked |= act.ask
        self.refusals += act.refuse
        self.offered = act.take or self.offered
        return act

    def statement(self) -> Vector:
        """What I take in the end: what was agreed, else what I would like."""
        return self.agreed or self._keep_valuable()

    def _chance(self, p: float) -> bool:
        return self.rng.random() < p

    def _worth(self, take: Vector) -> int:
        return sum(v * t for v, t in zip(self.values, take, strict=True))

    def _content(self, offer: Vector) -> bool:
        """Whether to accept. Open wants the best joint deal if it can see it, and else to have been understood."""
        theirs, floor = self.heard.values, ENOUGH[self.temperament] - self.refusals
        if self.temperament == "open":
            if theirs is not None:
                best = self._joint(self._joint_best(theirs), theirs)
                return self._joint(offer, theirs) == best or (self.refusals > 0 and self._worth(offer) >= floor)
            if not self.revealed:
                return False
        return self._worth(offer) >= floor

    # ---- what to say when the other's offer, if there is one, is not accepted ----------------------------------------

    def _candid(self) -> Act:
        """The open thing to do next: offer the best joint deal, or state the values, or ask."""
        theirs, pending = self.heard.values, self.heard.offer is not None
        if theirs is not None and (self.revealed or not (self.heard.last.ask or self._chance(0.3))):
            take = self._joint_best(theirs)
            if self._chance(0.65):
                return Act(take=take, reveal=self.values, against=theirs, refuse=pending, best=True)
            return Act(take=take, refuse=pending, best=True)
        if not self.revealed:
            refuse = pending and self._chance(0.6)
            return Act(reveal=self.values, refuse=refuse, ask=theirs is None and not refuse and self._chance(0.5))
        return Act(ask=True, refuse=pending)

    def _open(self) -> Act:
        """Candid; a question that stays unanswered is followed by an offer on what little is known."""
        if self.heard.values is None and self.heard.offer is None and self.spoken == 0 and self._chance(0.12):
            return Act(ask=True)
        if self.heard.values is None and self.asked and self.revealed:
            return Act(take=self._keep_valuable(), refuse=self.heard.offer is not None)
        return self._candid()

    def _vague(self) -> Act:
        """Says what it likes most or can spare, and offers on hints alone."""
        pending = self.heard.offer is not None
        if self.refusals > 1 and self._chance(0.3):
            return Act(leave=True)
        if not self.hinted and self._chance(0.85):
            spare, ask = self._least(), self._chance(0.4)
            if not pending and self.values[spare] < 2 and self._chance(0.4):
                return Act(spare=spare, ask=ask)
            return Act(want=self._favourite(), ask=ask, refuse=pending)
        return Act(take=self._keep_valuable(), refuse=pending)

    def _hard(self) -> Act:
        """Asks for nearly everything, gives in slowly, and leaves when it has refused enough."""
        pending = self.heard.offer is not None
        if self._chance((0.0, 0.4, 0.8)[min(self.refusals, 2)]):
            return Act(leave=True)
        reason = self._favourite() if self._chance(0.4) else None
        if not pending and reason is not None and not self.hinted:
            return Act(want=reason)
        return Act(take=self._demand(), refuse=pending, want=reason if pending else None)

    def _splitter(self) -> Act:
        """Halves everything without asking."""
        pending = self.heard.offer is not None
        if self.refusals > 1 and self._chance(0.3):
            return Act(leave=True)
        return Act(take=self._half(), refuse=pending)

    def _hasty(self) -> Act:
        """Offers what comes to mind, or closes before anything is settled. It accepts whatever it is offered."""
        if (self.spoken or self.heard.last != Act()) and self._chance(0.4):
            return Act(close=True)
        mine = self._favourite()
        return Act(take=tuple(c if k == mine else self.rng.randint(0, c) for k, c in enumerate(self.counts)))

    # ---- allocations -------------------------------------------------------------------------------------------------

    def _joint_best(self, theirs: Vector) -> Vector:
        """Each type goes to whom it is worth more; what is worth the same to both is theirs, as a courtesy."""
        return tuple(c if mine > other else 0 for c, mine, other in zip(self.counts, self.values, theirs, strict=True))

    def _joint(self, take: Vector, theirs: Vector) -> int:
        return sum(m * t + o * (c - t) for m, o, t, c in zip(self.values, theirs, take, self.counts, strict=True))

    def _favourite(self) -> int:
        return max(range(len(self.counts)), key=lambda k: (self.values[k] * self.counts[k], -k))

    def _least(self) -> int:
        return min(range(len(self.counts)), key=lambda k: (self.values[k], k))

    def _half(self) -> Vector:
        """Half of each type; the odd ones go here and there in turn."""
        up = self._chance(0.5)
        half = []
        for c in self.counts:
            half.append((c + up) // 2)
            up ^= c % 2 == 1
        return tuple(half)

    def _keep_valuable(self) -> Vector:
        """My favourite type, what they can spare, nothing of what they want, and half of the rest."""
        mine, heard, take = self._favourite(), self.heard, list(self._half())
        for k, c in enumerate(self.counts):
            if k == mine or (k == heard.spare and self.values[k]):
                take[k] = c
            elif k == heard.want:
                take[k] = 0
        return tuple(take)

    def _demand(self) -> Vector:
        """Everything but an item or two, one more of them with each refusal, and nothing of my favourite type."""
        mine = self._favourite()
        others = [k for k, c in enumerate(self.counts) if k != mine for _ in range(c)]
        given = self.rng.sample(others, min(len(others), self.refusals + 1))
        return tuple(c - given.count(k) for k, c in enumerate(self.counts))


def scripted_dialogue(game: DealGame, scenario: Scenario, rng: random.Random) -> ScriptedDialogue:
    """Two temperaments, drawn independently, hold the negotiation."""
    deal: Deal = scenario.data
    names = rng.choices(list(TEMPERAMENTS), weights=list(TEMPERAMENTS.values()), k=2)
    sides = [Negotiator(deal.counts, deal.values[i], names[i], random.Random(rng.getrandbits(64))) for i in (0, 1)]
    first = rng.randrange(2)
    turns: list[tuple[int, str, str]] = []
    finals: tuple[str, str] | None = None
    for n in range(MAX_UTTERANCES):
        side = (first + n) % 2
        speaker, listener = sides[side], sides[1 - side]
        told, left = speaker.heard.values is not None, speaker.heard.last.leave
        act = speaker.act()
        turns.append((side, utter(act, deal.counts, game.items, speaker.rng, told=told, left=left), "utterance"))
        listener.heard.hear(act, deal.counts)
        if act.close:
            if listener.agreed is None and speaker.agreed is not None:
                listener.agreed = listener.offered
            finals = (game.statement(sides[0].statement()), game.statement(sides[1].statement()))
            turns += [(who, finals[who], "final") for who in (side, 1 - side)]
            break
        if act.leave and left and rng.random() < 0.5:
            break
    return ScriptedDialogue(
        scenario=scenario,
        first_speaker=first,
        temperaments=(names[0], names[1]),
        turns=turns,
        outcome=game.judge(scenario, finals),
    )


def corpus(game: DealGame, n: int, seed: int) -> list[ScriptedDialogue]:
    """`n` dialogues over contexts of the training split; the same seed gives the same dialogues."""
    rng = random.Random(seed)
    return [scripted_dialogue(game, game.sample(rng, "train"), rng) for _ in range(n)]
