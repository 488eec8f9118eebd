"""What is negotiated, and how a game scores it: the nouns that every game shares, and the one interface a game implements."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Persona:
    """Whom a side speaks for. The instructions are told to that side alone."""

    name: str
    instructions: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One negotiation to be held. A side's context begins with `shared_text`, the same for both, then `private_text[i]`, which is
    told to side i alone; `data` is the game's own typed description."""

    game: str
    id: str
    split: str  # "train" | "heldout"
    private_text: tuple[str, str]
    data: Any
    shared_text: str = ""
    personas: tuple[Persona, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a negotiation ended. `scores` are in the game's points; `failure` names the kind of a failed deal, None when agreed.
    `rounds` were held, where that is counted."""

    agreed: bool
    scores: tuple[float, float]
    failure: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # the game's own measures
    rounds: int | None = None


class Game(Protocol):
    """A verifiable two-sided game. Side 0 and side 1 differ only in what they are privately told."""

    name: str
    final_prompt: str  # what both sides are asked once the talk is closed
    close: str  # what an utterance that closes the talk ends with

    @property
    def selection_form(self) -> str:
        """For people: how a final statement is written."""
        ...

    def sample(self, rng: random.Random, split: str) -> Scenario:
        """A scenario of the split, drawn with `rng` alone."""
        ...

    def closes(self, text: str) -> bool:
        """Whether this utterance ends the talk, after which both sides state their selection."""
        ...

    def judge(self, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
        """Score the two final statements; None means that the talk ended without a close."""
        ...

    def rewards(self, scenario: Scenario, outcome: Outcome, objective: str) -> tuple[float, float]:
        """Reward of each side under `objective`; an unknown objective raises ValueError."""
        ...

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Means over dialogues, `dialogues` and `agreement` among them."""
        ...
