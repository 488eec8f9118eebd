"""Dilemmas without a right answer: two opposed personas look for a resolution, or one policy answers alone;
a judge scores it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from duologue.model.settings import setting
from duologue.rollout.games.game import (
    UNSCORED,
    Game,
    GameSettings,
    Measure,
    Outcome,
    Persona,
    Scenario,
    Shown,
)
from duologue.rollout.games.template import fill, load_template
from duologue.rollout.games.texts import NEEDS, SHIPPED, Row, read

ASPECTS = ("knowledge", "benevolence", "power", "vitality")  # each scored from 0 to HIGHEST
HIGHEST = 5
NO_AGREEMENT = "no_agreement"
MEASURES = {
    "agreement": Measure("agreement", "{:.1%}", "agreed"),
    "score": Measure("judge's score from 0 to 5", "{:.2f}"),
    **{aspect: Measure(f"{aspect}, from 0 to 5", "{:.2f}") for aspect in ASPECTS},
    "rounds": Measure("rounds to agreement", "{:.2f}"),
    "unscored_share": Measure("unscored", "{:.1%}", "unscored"),
}
FAILURES = {NO_AGREEMENT: "no agreement", UNSCORED: "the judge gave no valid answer"}
PROMPTS = Path(__file__).parent / "prompts"


class Item(NamedTuple):
    """What is to be resolved, and whose it is: nobody's where any pair of personas may meet over it."""

    id: str
    text: str
    personas: tuple[Persona, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class DilemmaSettings(GameSettings):
    """Files of texts, by default those that come with the package."""

    dilemmas: str = setting("", "a .jsonl file of dilemmas to train on")
    personas: str = setting("", "a .jsonl file of pairs of personas")
    tasks: str = setting(
        "", "a .jsonl file of held-out tasks, which bring their personas; alone, of questions"
    )
    prompts: str = setting("", "a folder of prompts that replace the package's")


class DilemmaGame(Game):
    """Training dilemmas meet random pairs of personas; the held-out tasks bring their own."""

    name = "dilemma"
    protocol = "deliberation"
    Settings = DilemmaSettings
    settings: DilemmaSettings
    questions = SHIPPED["questions"]  # held out too, for one who answers alone
    measures = MEASURES
    failures = FAILURES
    final_form = "The resolution, as the policy writes it:\n{}"

    def __init__(self, settings: DilemmaSettings | None = None) -> None:
        super().__init__(settings)
        files, prompts = self.settings, self.settings.prompts
        self.player = load_template(prompts, PROMPTS, "player", {"name", "instructions"}, {"instructions"})
        self.final = load_template(prompts, PROMPTS, "final", {"personas", "transcript"}, {"transcript"})
        self.answer = load_template(prompts, PROMPTS, "alone", set(), set())
        dilemmas = read(files.dilemmas or SHIPPED["dilemmas"], NEEDS["dilemmas"])
        tasks = read(files.tasks or SHIPPED["conflicts"], NEEDS["questions" if self.alone else "conflicts"])
        pairs = read(files.personas or SHIPPED["personas"], NEEDS["personas"])
        self.pairs = [(row["id"], _pair(row)) for row in pairs]
        self.items = {
            "train": [Item(row["id"], row["text"]) for row in dilemmas],
            "heldout": [Item(row["id"], row["text"], () if self.alone else _pair(row)) for row in tasks],
        }

    def sample(self, rng: random.Random, split: str) -> Scenario:
        item = rng.choice(self.items[split])
        if item.personas or self.alone:
            return self.scenario(item, split, item.personas)
        pair_id, pair = rng.choice(self.pairs)
        return self.scenario(item, split, pair, pair_id)

    def scenario(self, item: Item, split: str, pair: tuple[Persona, ...], pair_id: str = "") -> Scenario:
        """`item` for these personas, or for one who answers alone."""
        private = ("", "") if self.alone else (self.private_text(pair[0]), self.private_text(pair[1]))
        return Scenario(
            game=self.name,
            id=f"{item.id}+{pair_id}" if pair_id else item.id,
            split=split,
            data=None,
            shared_text=item.text,
            private_text=private,
            personas=() if self.alone else pair,
        )

    def private_text(self, persona: Persona) -> str:
        return fill(self.player, {"name": persona.name, "instructions": persona.instructions})

    def final_parts(self, scenario: Scenario) -> list[str]:
        personas = "\n\n".join(f"{p.name}: {p.instructions}" for p in scenario.personas)
        return [fill(part, {"personas": personas}) for part in self.final.split("{transcript}")]

    def longest(self, length: Callable[[str], int]) -> Scenario:
        """The longest text, for two personas of the longest name and the longest instructions."""
        items = [item for split in self.items.values() for item in split]
        pairs = [pair for _, pair in self.pairs] + [item.personas for item in items]
        personas = [persona for pair in pairs for persona in pair]
        name = max((p.name for p in personas), key=length)
        instructions = max((p.instructions for p in personas), key=length)
        item = max(items, key=lambda item: length(item.text))
        return self.scenario(item, "train", (Persona(name, instructions),) * 2)

    def outcome(
        self,
        rounds: int,
        agreed: bool = False,
        failure: str | None = None,
        answer: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """`answer` is the judge's, where it scored the resolution."""
        metrics = {} if answer is None else {aspect: float(answer[aspect]) for aspect in ASPECTS}
        score = sum(metrics.values()) / len(ASPECTS)
        return Outcome(
            agreed=agreed,
            scores=(score, score),
            failure=failure,
            metrics=metrics,
            rounds=rounds,
            reason="" if answer is None else answer.get("reason", ""),
        )

    def rewards(self, scenario: Scenario, outcome: Outcome) -> tuple[float, float] | None:
        """What the judge gives, for both sides."""
        return None if outcome.failure == UNSCORED else outcome.scores

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """`agreement` and `rounds` to it, over the dialogues that were judged; the aspects over those that
        were scored, `score` over all but the unscored, 0 without an agreement.
        """
        judged = [o for o in outcomes if o.agreed or o.failure != UNSCORED]
        agreed = [o for o in outcomes if o.agreed]
        scored = [o for o in agreed if o.metrics]
        rewarded = [o for o in outcomes if o.failure != UNSCORED]
        return {
            "dialogues": float(len(outcomes)),
            "agreement": len(agreed) / max(len(judged), 1),
            "rounds": sum(o.rounds or 0 for o in agreed) / max(len(agreed), 1),
            "unscored_share": sum(o.failure == UNSCORED for o in outcomes) / max(len(outcomes), 1),
            "score": sum(o.scores[0] for o in rewarded) / max(len(rewarded), 1),
            **{aspect: sum(o.metrics[aspect] for o in scored) / max(len(scored), 1) for aspect in ASPECTS},
        }

    # ---- for people ----------------------------------------------------------------------------------------

    @classmethod
    def shown(cls, record: Mapping[str, Any]) -> Shown:
        """By the names of the personas, each with what it wants."""
        outcome, personas = record["outcome"] or {}, record["personas"]
        names = [persona["name"] for persona in personas] or ["the policy", ""]
        return Shown(
            sides=(names[0], names[1]),
            told=tuple(persona["instructions"] for persona in personas),
            stated="writes the resolution" if personas else "answers",
            verdict=cls.verdict(outcome),
            measures=tuple(cls.in_words(name, value) for name, value in outcome.get("metrics", {}).items()),
            reason=outcome.get("reason", ""),
        )

    @classmethod
    def verdict(cls, outcome: Mapping[str, Any]) -> str:
        if not outcome.get("agreed"):
            return cls.failure_in_words(outcome.get("failure"))
        start = "" if cls.alone else f"agreed in round {outcome['rounds']}, "
        if outcome["failure"]:
            return start + cls.failure_in_words(outcome.get("failure"))
        return start + f"the judge gives {outcome['scores'][0]:g} of {HIGHEST}"

    @classmethod
    def in_words(cls, name: str, value: float) -> str:
        return f"{name} {value:g}"


class AloneGame(DilemmaGame):
    """One policy answers a dilemma by itself."""

    name = "dilemma_alone"
    alone = True

    def final_parts(self, scenario: Scenario) -> list[str]:
        return [self.answer]


def _pair(row: Row) -> tuple[Persona, ...]:
    return tuple(Persona(row[side]["name"], row[side]["instructions"]) for side in ("first", "second"))
