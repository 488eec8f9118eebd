"""Dilemmas without a right answer: two opposed personas look for a resolution, or one policy answers alone; a judge scores it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from duologue.model.settings import setting
from duologue.rollout.games.game import Game, GameSettings, Outcome, Persona, Scenario
from duologue.rollout.games.template import fill, load_template
from duologue.rollout.games.texts import NEEDS, SHIPPED, Row, read
from duologue.rollout.judge.judge import UNSCORED
from duologue.rollout.judge.questions import ASPECTS

Item = tuple[
    str, str, tuple[Persona, ...]
]  # id, text, the personas that belong to it: none where any pair may meet
PROMPTS = Path(__file__).parent / "prompts"


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
    Settings = DilemmaSettings
    settings: DilemmaSettings
    alone: ClassVar[bool] = False  # one answers, without a talk
    questions = SHIPPED["questions"]  # held out too, for one who answers alone

    def __init__(self, settings: DilemmaSettings | None = None) -> None:
        super().__init__(settings)
        dilemmas, personas = self.settings.dilemmas, self.settings.personas
        tasks, prompts, alone = self.settings.tasks, self.settings.prompts, self.alone
        self.player = load_template(prompts, PROMPTS, "player", {"name", "instructions"}, {"instructions"})
        self.final = load_template(prompts, PROMPTS, "final", {"personas", "transcript"}, {"transcript"})
        self.answer = load_template(prompts, PROMPTS, "alone", set(), set())
        rows = read(dilemmas or SHIPPED["dilemmas"], NEEDS["dilemmas"])
        self.items: dict[str, list[Item]] = {"train": [(row["id"], row["text"], ()) for row in rows]}
        rows = read(tasks or SHIPPED["conflicts"], NEEDS["questions" if alone else "conflicts"])
        self.items["heldout"] = [(row["id"], row["text"], () if alone else _pair(row)) for row in rows]
        rows = read(personas or SHIPPED["personas"], NEEDS["personas"])
        self.pairs = [(row["id"], _pair(row)) for row in rows]

    def sample(self, rng: random.Random, split: str) -> Scenario:
        item = rng.choice(self.items[split])
        pair_id, pair = ("", item[2]) if item[2] or self.alone else rng.choice(self.pairs)
        return self.scenario(item, split, pair, pair_id)

    def scenario(self, item: Item, split: str, pair: tuple[Persona, ...], pair_id: str = "") -> Scenario:
        """`item` for these personas, or for one who answers alone."""
        name, text, _ = item
        private = ("", "") if self.alone else (self.private_text(pair[0]), self.private_text(pair[1]))
        return Scenario(
            game=self.name,
            id=f"{name}+{pair_id}" if pair_id else name,
            split=split,
            data=None,
            shared_text=text,
            private_text=private,
            personas=() if self.alone else pair,
        )

    def private_text(self, persona: Persona) -> str:
        return fill(self.player, {"name": persona.name, "instructions": persona.instructions})

    def personas(self) -> list[Persona]:
        """All that can speak."""
        return [p for _, pair in self.pairs for p in pair] + [
            p for *_, own in self.items["heldout"] for p in own
        ]

    def rewards(self, scenario: Scenario, outcome: Outcome) -> tuple[float, float] | None:
        """What the judge gives, for both sides."""
        return None if outcome.failure == UNSCORED else outcome.scores

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """`agreement` and `rounds` to it, over the dialogues that were judged; the aspects over those that were
        scored, `score` over all but the unscored, 0 without an agreement."""
        judged = [o for o in outcomes if o.agreed or o.failure != UNSCORED]
        agreed = [o for o in outcomes if o.agreed]
        scored, settled = [o for o in agreed if o.metrics], [o for o in outcomes if o.failure != UNSCORED]
        return {
            "dialogues": float(len(outcomes)),
            "agreement": len(agreed) / max(len(judged), 1),
            "rounds": sum(o.rounds or 0 for o in agreed) / max(len(agreed), 1),
            "unscored_share": sum(o.failure == UNSCORED for o in outcomes) / max(len(outcomes), 1),
            "score": sum(o.scores[0] for o in settled) / max(len(settled), 1),
            **{aspect: sum(o.metrics[aspect] for o in scored) / max(len(scored), 1) for aspect in ASPECTS},
        }


class AloneGame(DilemmaGame):
    """One policy answers a dilemma by itself."""

    name = "dilemma_alone"
    alone = True


def _pair(row: Row) -> tuple[Persona, ...]:
    return tuple(Persona(row[side]["name"], row[side]["instructions"]) for side in ("first", "second"))
