"""Any game of two that is told in text: a class of a user's with four methods (user_game.py).

A scenario is a seed; a dialogue is the game that this seed begins and the moves that were made in it. A side
hears what the game tells it when it is to move, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from duologue.model.settings import Options, setting
from duologue.rollout.games import user_game
from duologue.rollout.games.game import (
    UNSCORED,
    Game,
    GameSettings,
    Measure,
    Outcome,
    Scenario,
    failure_shares,
)
from duologue.rollout.games.scripted import ScriptedDialogue
from duologue.rollout.games.selection import AGREEMENT, COMPARED
from duologue.rollout.games.textarena_game import TextArenaGame
from duologue.rollout.games.user_game import FORMS, BadGameError, Match

TEXTARENA = "textarena:"
SEEDS = 2**30  # of the training split; as many others are held out
LONGEST_SCRIPT = 200  # moves of a game that scripts or chance play
UNFINISHED, FULL = "unfinished", "context_full"
NO_OPTIONS = Options()
MEASURES = {
    "agreement": AGREEMENT,
    "score_0": Measure("score of side 1", "{:.3f}", "side 1"),
    "score_1": Measure("score of side 2", "{:.3f}", "side 2"),
    "moves": Measure("moves", "{:.2f}"),
    "illegal": Measure("illegal moves of a game", "{:.3f}", "illegal"),
    "finished": Measure("finished", "{:.1%}"),
}
OF_LINES = (
    "step stage seconds reward loss mismatch entropy clip_share kl_old kl_start grad_norm lr "
    "tokens trained_tokens sampled_tokens update_tokens_per_s rollout_tokens_per_s idle_share "
    "no_variance_share resampled_groups resampled_dialogues resampled_tokens dropped_unscored "
    "flat_share_before flat_share_after bad_updates watch payoff partners elo eval eval_seconds eval_share "
    "start_eval start_eval_seconds start_eval_share peak_memory_bytes instruction_set"
)  # what a line of metrics.jsonl has beside a game's measures
# No names for a game's own measures.
TAKEN = {"dialogues", "score_0", "score_1", "moves", "finished", "unscored", *OF_LINES.split()}


@dataclass(frozen=True, kw_only=True)
class TextGameSettings(GameSettings):
    """A game of your own, by its class or its file, or one of TextArena's (docs/games.md)."""

    options: Options = setting(  # noqa: RUF009
        NO_OPTIONS, "what the game is made with, its own names and values"
    )
    objective: str = setting(
        "selfish",
        "what a side's reward is: 'selfish' its score, 'cooperative' the mean of both scores",
        one_of=("selfish", "cooperative"),
    )
    unfinished: float = setting(
        -1.0, "the score of both sides where the limit of moves or of a context ends a game", least=-1e9
    )


class TextGame(Game):
    """What is drawn, told, measured and rewarded of it."""

    name = "text_game"
    protocol = "text_game"
    Settings = TextGameSettings
    settings: TextGameSettings
    observed = True
    measures = MEASURES
    compared = COMPARED
    failures: ClassVar[Mapping[str, str]] = {
        UNFINISHED: "the limit of moves came before the end",
        FULL: "a context was full before the end",
    }

    def __init__(self, settings: TextGameSettings | None = None) -> None:
        """BadGameError where the game cannot be made or does not begin as a game should."""
        super().__init__(settings)
        named = self.settings.name
        if not named:
            raise BadGameError(f"game.name = '': accepted is {FORMS}")
        if named.startswith(TEXTARENA):
            self._make: user_game.Make = partial(TextArenaGame, named.removeprefix(TEXTARENA))
        else:
            self._make = user_game.find(named)
        user_game.check_options(self._make, named, self.settings.options)
        opening = self.begin(0)
        self.has_script, self.has_step_scores = opening.can("script"), opening.can("scores_so_far")

    def begin(self, seed: int) -> Match:
        return Match(self._make, self.settings.name, self.settings.options, seed)

    def sample(self, rng: random.Random, split: str) -> Scenario:
        if split not in ("train", "heldout"):
            raise ValueError(f"split = {split!r}: accepted is one of train, heldout")
        return self.scenario(rng.randrange(SEEDS) + SEEDS * (split == "heldout"), split)

    def scenario(self, seed: int, split: str) -> Scenario:
        name = self.settings.name
        told = self.begin(seed).told
        return Scenario(game=name, id=f"{name}-{seed}", split=split, private_text=told, data=seed)

    def opening(self, scenario: Scenario) -> str:
        return self.begin(scenario.data).text

    def outcome(self, match: Match, failure: str | None = None) -> Outcome:
        """Of a game that is over, or that a limit ended."""
        if failure is not None:
            match.stop()
        measures = {"moves": float(match.moves), "illegal": float(match.illegal), **match.summary}
        taken = TAKEN & match.summary.keys()
        if taken:
            accepted = f"any name but {', '.join(sorted(TAKEN))}"
            raise BadGameError(f"{match.name}: summary() has {min(taken)!r}: accepted is {accepted}")
        limited = self.settings.unfinished
        return Outcome(
            agreed=failure is None and bool(measures.get("agreement", True)),
            scores=match.scores if failure is None else (limited, limited),
            failure=failure,
            metrics=measures,
        )

    def rewards(self, scenario: Scenario, outcome: Outcome) -> tuple[float, float] | None:
        if outcome.failure == UNSCORED:
            return None
        first, second = outcome.scores
        if self.settings.objective == "selfish":
            return first, second
        return (first + second) / 2, (first + second) / 2

    def seen_from(self, scenario: Scenario, outcome: Outcome, side: int) -> dict[str, float]:
        own, other = outcome.scores[side], outcome.scores[1 - side]
        return {"agreement": float(outcome.agreed), "own": own, "partner": other, "lead": own - other}

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Means over all dialogues; of the game's own measures over those that have them."""
        n = max(len(outcomes), 1)
        names = dict.fromkeys(["moves", "illegal", *(name for o in outcomes for name in o.metrics)])
        means = {}
        for name in names:
            values = [o.metrics[name] for o in outcomes if name in o.metrics]
            means[name] = sum(values) / max(len(values), 1)
        return {
            "dialogues": float(len(outcomes)),
            **{f"score_{side}": sum(o.scores[side] for o in outcomes) / n for side in (0, 1)},
            **means,
            "agreement": sum(o.agreed for o in outcomes) / n,
            "finished": sum(o.failure is None for o in outcomes) / n,
            **failure_shares(outcomes, self.failures),
        }

    # ---- without a policy ----------------------------------------------------------------------------------

    def scripted(self, rng: random.Random) -> ScriptedDialogue:
        """A game of the training split between two sides that the game's script speaks for, or without one
        chance among the legal moves; it ends where neither is there.
        """
        scenario = self.sample(rng, "train")
        match = self.begin(scenario.data)
        first = match.side
        turns: list[tuple[int, str, str]] = []
        while not match.done and match.moves < LONGEST_SCRIPT:
            side = match.side
            if match.text:
                turns.append((side, match.text, "prompt"))
            if not self.has_script and match.legal is None:
                break
            said = match.scripted(rng) if self.has_script else rng.choice(match.legal or [])
            turns.append((side, said, "utterance"))
            match.step(said)
        return ScriptedDialogue(
            scenario=scenario,
            first_speaker=first,
            temperaments=("", ""),
            turns=turns,
            outcome=self.outcome(match, None if match.done else UNFINISHED),
            final_prompt="",
            observed=True,
        )

    def longest(self, length: Callable[[str], int]) -> Scenario:
        """The longest told of a few: a game's texts have no bound that is known."""
        scenarios = [self.scenario(seed, "train") for seed in range(16)]
        return max(scenarios, key=lambda s: max(map(length, s.private_text)))

    # ---- for people ----------------------------------------------------------------------------------------

    @classmethod
    def measures_among(cls, names: Iterable[str]) -> dict[str, Measure]:
        own = {name: Measure(name.replace("_", " "), "{:.3f}") for name in names if _is_own(name)}
        return {**cls.measures, **own}

    @classmethod
    def verdict(cls, outcome: Mapping[str, Any]) -> str:
        if outcome and not outcome["failure"]:
            return "over: {:g} and {:g} points".format(*outcome["scores"])
        return f"not over: {cls.failure_in_words(outcome.get('failure'))}"

    def result(self, outcome: Outcome, side: int) -> str:
        return f"You score {outcome.scores[side]:g}, the policy {outcome.scores[1 - side]:g}."


def _is_own(name: str) -> bool:
    return name not in MEASURES and name not in TAKEN and not name.startswith("failure_")
