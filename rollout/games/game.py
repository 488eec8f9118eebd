"""What is talked about, and how it is scored: the nouns that every game shares, and the interface of a
game.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from duologue.model.settings import check, setting

UNSCORED = "unscored"  # the failure of a dialogue that got no answer from a judge or an opponent


@dataclass(frozen=True)
class Persona:
    """Whom a side speaks for. The instructions are told to that side alone."""

    name: str
    instructions: str


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One dialogue to be held. A side's context begins with `shared_text`, the same for both, then
    `private_text[i]`, which is told to side i alone; `data` is the game's own typed description.
    """

    game: str
    id: str
    split: str  # "train" | "heldout"
    private_text: tuple[str, str]
    data: Any
    shared_text: str = ""
    personas: tuple[Persona, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a dialogue ended. `scores` are in the game's points; `failure` names the kind of a failure, None
    when agreed.

    `rounds` were held, where that is counted; `reason` is a judge's, where it gave one.
    """

    agreed: bool
    scores: tuple[float, float]
    failure: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # the game's own measures
    rounds: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Measure:
    """How a mean of `Game.summarise` is shown. `short` heads it in the progress line, "" leaves it out
    there.
    """

    heading: str
    format: str
    short: str = ""

    @property
    def is_share(self) -> bool:
        return "%" in self.format


@dataclass(frozen=True, kw_only=True)
class Published:
    """Measures that others have reached in the same game, by who, and where they come from."""

    columns: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class GameSettings:
    """What a game lets a user set, the keys of a run's [game]: a game that has more than its name extends
    this.
    """

    name: str = setting("", "the game, by its name in the catalogue")

    def __post_init__(self) -> None:
        check("game", self)
        self.rules()

    def rules(self) -> None:
        """Raise ValueError for settings that contradict each other."""


class Game(ABC):
    """What two sides talk about, by which protocol, and what it is worth. Side 0 and side 1 differ only in
    what they are told. A new game is a class like this, a line in catalogue.py and a recipe; all words that
    people read are here.
    """

    name: ClassVar[str]
    protocol: ClassVar[str]  # a function of rollout/selfplay/protocols.py
    Settings: ClassVar[type[GameSettings]] = GameSettings  # the game is made of an object of it
    alone: ClassVar[bool] = False  # one policy answers, without a talk
    observed: ClassVar[bool] = False  # a side hears what the game tells it, not the other's words
    close: str = ""  # what an utterance that ends the talk ends with, where one does
    final_prompt: str = ""  # what a side is asked in its own context before its final statement

    measures: ClassVar[Mapping[str, Measure]] = {}  # of `summarise`, in the order of tables
    compared: ClassVar[Mapping[str, Measure]] = {}  # of `seen_from`, in the order of tables
    failures: ClassVar[Mapping[str, str]] = {}  # the kinds of a failed dialogue, in words
    sides: Sequence[str] = ("side 1", "side 2")  # what they are called where no personas speak
    stated: str = "states"  # what a side does with its final statement
    ending: str = ""  # tells a person how the talk ends
    selection_form: str = "any words"  # how a person's final statement is written
    final_form: str = "{}"  # a policy's final statement, as a person who plays sees it

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

    def seen_from(self, scenario: Scenario, outcome: Outcome, side: int) -> dict[str, float]:
        """The measures of `compared` of one dialogue, as a side sees them. A comparison of players takes the
        mean of each over the dialogues that have it.
        """
        return {}

    def final_parts(self, scenario: Scenario) -> list[str]:
        """The texts of a request for the final statement, with the dialogue between them, where it is made
        in a context of its own; empty where it is made in the side's context, by `final_prompt`.
        """
        return []

    def opening(self, scenario: Scenario) -> str:
        """What the side that moves first hears, where a game tells the sides."""
        return ""

    def final_examples(self) -> list[str]:
        """Final statements as long as any that the game asks for, where it asks for a form of words."""
        return []

    def longest(self, length: Callable[[str], int]) -> Scenario:
        """A scenario that is told in as many tokens as any."""
        return self.sample(random.Random(0), "train")

    # ---- for people ----------------------------------------------------------------------------------------

    @classmethod
    def published(cls, settings: GameSettings) -> Published:
        """What others have reached under these settings."""
        return Published()

    @classmethod
    def measures_among(cls, names: Iterable[str]) -> Mapping[str, Measure]:
        """`measures`, and how those of `names` are shown that only a game of a user knows."""
        return cls.measures

    @classmethod
    def shown(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """A line of dialogues.jsonl in words: what the `sides` are called, what each alone was `told`, what
        they do with a final statement (`stated`), the `verdict`, its `measures` and a judge's `reason`.
        """
        outcome, personas = record["outcome"] or {}, record["personas"]
        told = [persona["instructions"] for persona in personas] or record["scenario"]["private"]
        return {
            "sides": [persona["name"] for persona in personas] or cls.sides,
            "told": [text for text in told if text],
            "stated": cls.stated,
            "verdict": cls.verdict(outcome),
            "measures": [cls.in_words(name, value) for name, value in outcome.get("metrics", {}).items()],
            "reason": outcome.get("reason"),
        }

    @classmethod
    def verdict(cls, outcome: Mapping[str, Any]) -> str:
        """How a dialogue ended, of its record; an empty one is unscored."""
        if outcome.get("agreed") and not outcome["failure"]:
            return "deal, {:g} and {:g} points".format(*outcome["scores"])
        return f"no deal: {cls.failure_in_words(outcome.get('failure'))}"

    @classmethod
    def failure_in_words(cls, kind: str | None) -> str:
        """None: there is no outcome at all."""
        kind = kind or UNSCORED
        return {UNSCORED: "nobody gave a valid answer", **cls.failures}.get(kind, kind)

    @classmethod
    def in_words(cls, name: str, value: float) -> str:
        """A measure of one outcome."""
        return f"{name.replace('_', ' ')} {value:.2f}"

    def can_state(self, scenario: Scenario, text: str) -> bool:
        """Whether a person's final statement can be read by the rules."""
        return True

    def result(self, outcome: Outcome, side: int) -> str:
        """What a person on `side` is told at the end; "" where nobody scores."""
        return ""


def failure_shares(outcomes: Sequence[Outcome], kinds: Iterable[str]) -> dict[str, float]:
    """How many of all failed in which way."""
    counts = Counter(o.failure for o in outcomes)
    return {f"failure_{kind}": counts[kind] / max(len(outcomes), 1) for kind in kinds}
