"""Scripted negotiators for `deal`: what a policy that starts from nothing imitates first.

Each side is a temperament with moods of speech. It sees the counts, its own values and what the other side said (as acts), never
the other's values. The mixture is made to be improved upon: about half of its agreements waste something, while the open
temperament shows how not to.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from duologue.rollout.games.deal import CLOSE, Deal, DealGame, Vector
from duologue.rollout.selfplay.scenario import Outcome, Scenario

TEMPERAMENTS = {"open": 0.42, "vague": 0.2, "hard": 0.14, "splitter": 0.14, "hasty": 0.1}
MAX_UTTERANCES = 10

REVEAL = (
    "to me {} .",
    "my values are {} .",
    "i will be open : {} .",
    "here is how i see it : {} .",
    "for my side it is {} .",
    "honestly , {} for me .",
)
HINT = (
    "i care most about the {0}s .",
    "i really want the {0}s .",
    "the {0}s matter most to me .",
    "what i need are the {0}s .",
    "my favourite is the {0} .",
    "mostly i am here for the {0}s .",
)
ASK = (
    "what are they worth to you ?",
    "and you ?",
    "what do you value ?",
    "how about your side ?",
    "which ones do you need ?",
    "tell me your values .",
)
OFFER = (
    "i take {0} , you take {1} .",
    "how about i take {0} and you take {1} ?",
    "i get {0} , you get {1} .",
    "let me have {0} and you keep {1} .",
    "my offer : {0} for me , {1} for you .",
    "we could do {0} for me and {1} for you .",
)
REFUSE = (
    "no , that is too little for me .",
    "sorry , i can not accept that .",
    "that does not work for me .",
    "no deal like this .",
    "i need more than that .",
    "you ask for too much .",
)
AGREE = (
    "deal .",
    "that works for me .",
    "sounds fair , deal .",
    "ok , i accept .",
    "great , let us do that .",
    "yes , agreed .",
)
CONFIRM = ("great .", "thank you .", "good , we are done .", "perfect .", "nice deal .", "ok then .")
LEAVE = ("then there is no deal .", "i would rather leave it .", "we will not agree .", "forget it .")


@dataclass(slots=True)
class Heard:
    """What one side knows of the other from its words: its values once revealed, the item it hinted at, its standing offer."""

    values: Vector | None = None
    favourite: int | None = None
    offer: Vector | None = None  # what I would take
    accepted: bool = False


@dataclass(slots=True)
class Act:
    """An utterance before it is words. `take` is what the speaker would take."""

    reveal: bool = False
    hint: int | None = None
    ask: bool = False
    refuse: bool = False
    take: Vector | None = None
    accept: bool = False
    close: bool = False
    leave: bool = False


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
    """One side. `act` decides from `heard` and its own state alone."""

    counts: Vector
    values: Vector
    temperament: str
    rng: random.Random
    heard: Heard = field(default_factory=Heard)
    revealed: bool = False
    hinted: bool = False
    last_take: Vector | None = None  # my standing offer
    refusals: int = 0
    agreed: Vector | None = None  # what I take once we agree

    def worth(self, take: Vector) -> int:
        return sum(v * t for v, t in zip(self.values, take, strict=True))

    def act(self) -> Act:
        if self.heard.accepted and self.last_take is not None:
            self.agreed = self.last_take
            return Act(close=True)
        act: Act = getattr(self, f"_{self.temperament}")()
        if act.accept:
            self.agreed = self.heard.offer
            act.close = self.rng.random() < 0.6
        if act.take is not None:
            self.last_take = act.take
        self.revealed |= act.reveal
        self.hinted |= act.hint is not None
        self.refusals += act.refuse
        return act

    # ---- temperaments ------------------------------------------------------------------------------------------------

    def _open(self) -> Act:
        """States its values, proposes the best joint deal that it can see, and trusts an offer made in knowledge of them."""
        theirs, offer = self.heard.values, self.heard.offer
        if theirs is not None:
            best = self._joint_best(theirs)
            if offer is not None and (self.revealed or self._joint(offer, theirs) == self._joint(best, theirs)):
                return Act(accept=True)
            if not self.revealed and offer is None and self.rng.random() < 0.25:
                return Act(reveal=True)
            return Act(take=best, refuse=offer is not None)
        if not self.revealed:
            return Act(reveal=True, ask=self.rng.random() < 0.5, refuse=offer is not None and self.rng.random() < 0.5)
        if offer is not None:
            return Act(accept=True) if self.worth(offer) >= 3 or self.refusals else Act(refuse=True, ask=True)
        if self.heard.favourite is not None or self.rng.random() < 0.5:
            return Act(take=self._keep_valuable(self.heard.favourite))
        return Act(ask=True)

    def _vague(self) -> Act:
        """Names what it likes most and offers on that alone."""
        offer = self.heard.offer
        if offer is not None and (self.worth(offer) >= 5 - self.refusals):
            return Act(accept=True)
        if not self.hinted and self.rng.random() < 0.8:
            return Act(hint=self._favourite(), ask=self.rng.random() < 0.4, refuse=offer is not None)
        return Act(take=self._keep_valuable(self.heard.favourite), refuse=offer is not None)

    def _hard(self) -> Act:
        """Asks for nearly everything, gives in slowly, and leaves when it has refused enough."""
        offer = self.heard.offer
        if offer is not None and self.worth(offer) >= 8 - self.refusals:
            return Act(accept=True)
        if self.refusals >= 4 and self.rng.random() < 0.6:
            return Act(leave=True)
        if not self.hinted and self.rng.random() < 0.3:
            return Act(hint=self._favourite(), refuse=offer is not None)
        return Act(take=self._demand(self.refusals), refuse=offer is not None)

    def _splitter(self) -> Act:
        """Halves everything without asking."""
        offer = self.heard.offer
        if offer is not None and self.worth(offer) >= 4 - self.refusals:
            return Act(accept=True)
        up = self.rng.random() < 0.5
        half = []
        for c in self.counts:
            half.append((c + up) // 2)
            up ^= c % 2 == 1
        return Act(take=tuple(half), refuse=offer is not None)

    def _hasty(self) -> Act:
        """Takes the first offer that comes; when it must speak first it asks, or offers without a thought."""
        if self.heard.offer is not None:
            return Act(accept=True)
        draw = self.rng.random()
        if draw < 0.25:
            return Act(reveal=not self.revealed, ask=True)
        return Act(take=tuple(self.rng.randint(0, c) for c in self.counts))

    # ---- allocations -------------------------------------------------------------------------------------------------

    def _joint_best(self, theirs: Vector) -> Vector:
        """Each type goes to whom it is worth more; I take what is worth the same to both."""
        return tuple(c if mine >= other else 0 for c, mine, other in zip(self.counts, self.values, theirs, strict=True))

    def _joint(self, take: Vector, theirs: Vector) -> int:
        return sum(m * t + o * (c - t) for m, o, t, c in zip(self.values, theirs, take, self.counts, strict=True))

    def _favourite(self) -> int:
        return max(range(len(self.counts)), key=lambda k: (self.values[k] * self.counts[k], -k))

    def _keep_valuable(self, theirs: int | None) -> Vector:
        """My favourite type, and half of what else is worth something to me; not the type that they hinted at, if it is not mine."""
        mine = self._favourite()
        take = []
        for k, c in enumerate(self.counts):
            share = c if k == mine else (c + 1) // 2 if self.values[k] > 1 else 0
            take.append(0 if k == theirs and k != mine else share)
        return tuple(take)

    def _demand(self, concessions: int) -> Vector:
        """Everything, less one more of the least valuable items with each concession."""
        take = list(self.counts)
        order = [k for k in sorted(range(len(take)), key=lambda k: self.values[k]) for _ in range(self.counts[k])]
        for k in order[: concessions + 1]:
            take[k] -= 1
        return tuple(take)


def _words(act: Act, speaker: Negotiator, game: DealGame) -> str:
    rng = speaker.rng
    parts: list[str] = []
    if act.accept:
        parts.append(rng.choice(AGREE))
    elif act.close:
        parts.append(rng.choice(CONFIRM))
    if act.refuse:
        parts.append(rng.choice(REFUSE))
    if act.reveal:
        stated = " , ".join(f"{item} {v}" for item, v in zip(game.items, speaker.values, strict=True))
        parts.append(rng.choice(REVEAL).format(stated))
    if act.hint is not None:
        parts.append(rng.choice(HINT).format(game.items[act.hint]))
    if act.take is not None:
        rest = tuple(c - t for c, t in zip(speaker.counts, act.take, strict=True))
        parts.append(rng.choice(OFFER).format(_share(act.take, game), _share(rest, game)))
    if act.ask:
        parts.append(rng.choice(ASK))
    if act.leave:
        parts.append(rng.choice(LEAVE))
    if act.close:
        parts.append(CLOSE)
    return " ".join(parts)


def _share(take: Vector, game: DealGame) -> str:
    named = [f"{n} {item}{'s' if n > 1 else ''}" for n, item in zip(take, game.items, strict=True) if n]
    return " and ".join(named) if named else "nothing"


def _listen(listener: Negotiator, act: Act, speaker_values: Vector) -> None:
    """What the words tell the other side. The speaker's values are passed on only when it stated them."""
    heard = listener.heard
    if act.reveal:
        heard.values = speaker_values
    if act.hint is not None:
        heard.favourite = act.hint
    heard.offer = None if act.take is None else tuple(c - t for c, t in zip(listener.counts, act.take, strict=True))
    heard.accepted = act.accept


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
        act = sides[side].act()
        turns.append((side, _words(act, sides[side], game), "utterance"))
        _listen(sides[1 - side], act, deal.values[side])
        if act.close:
            finals = _finals(game, sides, side)
            turns += [(side, finals[side], "final"), (1 - side, finals[1 - side], "final")]
            break
    return ScriptedDialogue(
        scenario=scenario,
        first_speaker=first,
        temperaments=(names[0], names[1]),
        turns=turns,
        outcome=game.judge(scenario, finals),
    )


def _finals(game: DealGame, sides: list[Negotiator], closer: int) -> tuple[str, str]:
    """Both state what was agreed: the closer its share, the other side what that leaves."""
    take = sides[closer].agreed
    assert take is not None
    rest = tuple(c - t for c, t in zip(sides[closer].counts, take, strict=True))
    statements = {closer: game.statement(take), 1 - closer: game.statement(rest)}
    return statements[0], statements[1]


def corpus(game: DealGame, n: int, seed: int) -> list[ScriptedDialogue]:
    """`n` dialogues over contexts of the training split; the same seed gives the same dialogues."""
    rng = random.Random(seed)
    return [scripted_dialogue(game, game.sample(rng, "train"), rng) for _ in range(n)]
