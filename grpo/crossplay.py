"""How players fare with each other: every pairing of seats on the same contexts with the same seeds.

    a, b = Player(name="a", engine=..., tokenizer=...), Player(name="b", ...)
    held = CrossPlay(config, game, [a, b])
    held.fares([(a, b), (b, a)], of=a)["own"]     # what a scores with b, in both seats: [contexts, dialogues]

A player is a policy on an engine, a server, or a scripted character. The contexts, the draws and the first
speakers are those of `evaluate`; unless the rules fix who opens, every dialogue is then held once more with
the other side first. Intervals hold 95 % of a percentile bootstrap over contexts (Efron 1979). All pairings
are resampled alike, so that the interval of a difference is paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from duologue.grpo.build import check_context, measuring_rules
from duologue.grpo.config import Config
from duologue.grpo.evaluate import draw_contexts, hold
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.game import Game, Scenario
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.contexts import Contexts
from duologue.rollout.selfplay.dialogue import Dialogue
from duologue.rollout.selfplay.foreign import ForeignSpeaker
from duologue.rollout.selfplay.speakers import Opponent, Speaker

RESAMPLES = 2000
Interval = dict[str, float | None]  # value, low, high; None where nothing was measured
Values = dict[str, np.ndarray]  # measure -> [contexts, dialogues], NaN where it does not count


@dataclass(kw_only=True, eq=False)
class Player:
    """Somebody who can have a side: a policy, with its engine and its tokenizer, or with `speaker` whoever
    is made for an arena with a given tokenizer.
    """

    name: str
    engine: Engine | None = None
    tokenizer: Tokenizer | None = None
    speaker: Callable[[Tokenizer], Speaker] | None = None


@dataclass(kw_only=True, frozen=True, eq=False)
class Pairing:
    """Two players in their seats. `seen[side]` holds the measures of the dialogues as that side sees them."""

    first: Player
    second: Player
    seen: tuple[Values, Values]
    dialogues: int
    unscored: int
    held: list[Dialogue]


@dataclass(eq=False)
class CrossPlay:
    """Holds each pairing when it is first asked for."""

    config: Config
    game: Game
    players: Sequence[Player]
    dialogues: int  # contexts
    scenarios: list[Scenario] = field(init=False)
    weights: np.ndarray = field(init=False)  # [RESAMPLES, contexts], how often each is drawn
    _held: dict[tuple[Player, Player], Pairing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.game.compared:
            raise ValueError(f"game.name = {self.game.name!r}: accepted is a game whose rules score it")
        if all(player.engine is None for player in self.players):
            names = ", ".join(player.name for player in self.players)
            raise ValueError(f"{names}: accepted are players of whom at least one is a checkpoint")
        self.scenarios = draw_contexts(self.config, self.game, self.dialogues)
        self.weights = resampled(len(self.scenarios), self.config.train.seed)

    def pairing(self, first: Player, second: Player) -> Pairing:
        """The dialogues of two players, each in its seat."""
        if (first, second) not in self._held:
            self._held[first, second] = self._play(first, second)
        return self._held[first, second]

    @property
    def pairings(self) -> list[Pairing]:
        """Those that were held, in that order."""
        return list(self._held.values())

    def fares(self, pairs: Iterable[tuple[Player, Player]], of: Player) -> Values:
        """The measures of several pairings, seen by `of` from its seats; by itself from both."""
        views = [
            pairing.seen[side]
            for pairing in (self.pairing(*pair) for pair in pairs)
            for side, player in enumerate((pairing.first, pairing.second))
            if player is of
        ]
        return {key: np.concatenate([view[key] for view in views], axis=1) for key in views[0]}

    def intervals(self, values: Values) -> dict[str, Interval]:
        """The mean of each measure over the dialogues that have it."""
        return {key: interval(*means(array, self.weights)) for key, array in values.items()}

    def differences(self, values: Values, others: Values) -> dict[str, Interval]:
        """Of the means of the same measures, paired by context."""
        result = {}
        for key, array in values.items():
            here, there = means(array, self.weights), means(others[key], self.weights)
            result[key] = interval(here[0] - there[0], here[1] - there[1])
        return result

    # ---- play ----------------------------------------------------------------------------------------------

    def _play(self, first: Player, second: Player) -> Pairing:
        engines = [player.engine for player in self.players if player.engine is not None]
        for engine in engines if len(engines) > 2 else ():  # two KV pools are there at a time
            if engine not in (first.engine, second.engine):
                engine.release_memory()
        arena, opponent = self._seated(first, second)
        fixed = self.game.observed or arena.rules.first_speaker == "first"
        openings = (False,) if fixed else (False, True)
        try:
            seed = self.config.train.seed
            held = [hold(arena, self.scenarios, seed, opponent, turned) for turned in openings]
        finally:
            arena.speakers.close()
        seen = [self._seen(held, side) for side in (0, 1)]
        outcomes = [dialogue.outcome for dialogues in held for dialogue in dialogues]
        return Pairing(
            first=first,
            second=second,
            seen=(seen[0], seen[1]),
            dialogues=len(outcomes),
            unscored=outcomes.count(None),
            held=[dialogue for dialogues in held for dialogue in dialogues],
        )

    def _seated(self, first: Player, second: Player) -> tuple[Arena, Opponent | None]:
        """An arena in which one of the two is the policy, and the other its opponent, or nobody where one
        player has both seats.
        """
        rules = measuring_rules(self.config, self.config.eval.temperature)
        policy, other = (first, second) if first.engine is not None else (second, first)
        tokenizer = policy.tokenizer or next(p.tokenizer for p in self.players if p.tokenizer is not None)
        if policy.engine is None:
            assert policy.speaker is not None
            arena = Arena(policy.speaker(tokenizer), tokenizer, self.game, rules)
        else:
            arena = Arena(policy.engine, tokenizer, self.game, rules)
        for player in (first, second):
            if player.engine is not None and player.tokenizer is not None:
                contexts = Contexts(player.tokenizer, self.game, rules)
                check_context(player.engine, contexts)
                player.engine.name_weights(0)
        if first is second and policy.engine is not None:
            return arena, None
        role = 0 if other is first else 1
        if other.engine is not None and other.tokenizer is not None:
            if other.tokenizer.equals(tokenizer):
                return arena, Opponent(role=role, name=other.name, engine=other.engine)
            arena.speakers.outside = ForeignSpeaker(other.engine, other.tokenizer, tokenizer)
        elif other.speaker is not None:
            arena.speakers.outside = other.speaker(tokenizer)
        return arena, Opponent(role=role, name=other.name)

    def _seen(self, held: Sequence[Sequence[Dialogue]], side: int) -> Values:
        """Of dialogues [openings][contexts]."""
        shape = len(self.scenarios), len(held)
        values = {key: np.full(shape, np.nan) for key in self.game.compared}
        for opening, dialogues in enumerate(held):
            for context, dialogue in enumerate(dialogues):
                if dialogue.outcome is None:
                    continue
                seen = self.game.seen_from(dialogue.scenario, dialogue.outcome, side)
                for key, value in seen.items():
                    values[key][context, opening] = value
        return values


# ---- intervals ---------------------------------------------------------------------------------------------


def resampled(n: int, seed: int) -> np.ndarray:
    """How often each of `n` contexts is drawn, in each resample: [RESAMPLES, n]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)


def means(values: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of values [contexts, dialogues] that are not NaN, and the same of every resample; NaN of
    nothing.
    """
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(1), known.sum(1).astype(float)
    with np.errstate(invalid="ignore"):
        return float(total.sum() / count.sum()), (weights @ total) / (weights @ count)


def interval(value: float, resamples: np.ndarray) -> Interval:
    """A value with the 2.5 and 97.5 percentiles of its resamples, of which NaN are left out."""
    if np.isnan(value):
        return dict.fromkeys(("value", "low", "high"))
    low, high = np.nanpercentile(resamples, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}
