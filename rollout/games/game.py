"""What is negotiated, and how a game scores it: the nouns that every game shares, and the one interface a game implements."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from duologue.model.settings import check, setting


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


@dataclass(frozen=True, kw_only=True, slots=True)
class GameSettings:
    """What a game lets a user set, the keys of a run's [game]: a game that has more than its name extends this."""

    name: str = setting("", "the game, by its name in the catalogue")

    def __post_init__(self) -> None:
        check("game", self)
        self.rules()

    def rules(self) -> None:
        """Raise ValueError for settings that contradict each other."""


class Game(ABC):
    """What two sides talk about. Side 0 and side 1 differ only in what they are privately told."""

    name: ClassVar[str]
    Settings: ClassVar[type[GameSettings]] = GameSettings  # the game is made of an object of it

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings or self.Settings()

    @abstractmethod
    def sample(self, rng: random.Random, split: str) -> Scenario:
        """A scenario of the split, drawn with `rng` alone."""

    @abstractmethod
    def rewards(self, scenario: Scenario, outcome: Outcome) -> tuple[float, float] | None:
        """Reward of each side under the game's settings; None for a dialogue that is unscored."""

    @abstractmethod
    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Means over dialogues, `dialogues` and `agreement` among them."""
