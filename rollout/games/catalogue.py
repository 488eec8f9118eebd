"""The games by name, and the scripted negotiators of those that have some: where a new game is entered.
Games of users (text_game.py) need no entry: their names say where they are.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from duologue.rollout.games import deal_scripts, price
from duologue.rollout.games.characters import TACTICS
from duologue.rollout.games.deal import DealGame
from duologue.rollout.games.deal_english import EnglishDealGame, EnglishPrioritiesGame
from duologue.rollout.games.dilemma import AloneGame, DilemmaGame
from duologue.rollout.games.game import Game, GameSettings
from duologue.rollout.games.price import PriceGame
from duologue.rollout.games.price_english import EnglishPriceGame
from duologue.rollout.games.priorities import Camper, PrioritiesGame
from duologue.rollout.games.scripted import ScriptedDialogue, Side
from duologue.rollout.games.text_game import TextGame
from duologue.rollout.games.user_game import FORMS, is_named

# Of a game, one of its scenarios, and draws; where a game has partners also of a `mixture` of their names.
Script = Callable[..., ScriptedDialogue]

GAMES: dict[str, type[Game]] = {
    kind.name: kind for kind in (DealGame, PriceGame, PrioritiesGame, DilemmaGame, AloneGame)
}
ENGLISH: dict[str, type[Game]] = {  # of those that have a second telling
    kind.name: kind for kind in (EnglishDealGame, EnglishPriceGame, EnglishPrioritiesGame)
}
SCRIPTS: dict[str, Script] = {
    "deal": deal_scripts.scripted_dialogue,
    "price": price.scripted_dialogue,
    "priorities": partial(deal_scripts.scripted_dialogue, kind=Camper),
}

SIDES: dict[str, Callable[..., Side]] = {  # of a game, a scenario, a role, the name of a character, and draws
    "deal": deal_scripts.make_side,
    "price": price.make_side,
    "priorities": partial(deal_scripts.make_side, kind=Camper),
}
TEMPERAMENTS: dict[str, Mapping[str, float]] = {  # what a corpus is made of, with weights
    "deal": deal_scripts.TEMPERAMENTS,
    "price": price.TEMPERAMENTS,
    "priorities": deal_scripts.TEMPERAMENTS,
}
MEANINGS = {name: character.meaning for name, character in TACTICS.items()}  # one line each


def characters(name: str) -> tuple[str, ...]:
    """The characters of a game that are told apart by what the literature calls them."""
    return tuple(TACTICS) if name in SIDES else ()


def partners(name: str) -> tuple[str, ...]:
    """Everybody who can negotiate in a game: its characters, and those whom its corpus is made of."""
    return tuple(dict.fromkeys((*characters(name), *TEMPERAMENTS.get(name, ()))))


ACCEPTED = f"one of {', '.join(map(repr, GAMES))}, or a game of your own: {FORMS}"


def game_kind(name: str) -> type[Game] | None:
    """The class of the game that is named, None where there is none."""
    return GAMES.get(name, TextGame if is_named(name) else None)


def kind_of(settings: GameSettings) -> type[Game]:
    """Of the settings of a game."""
    kind = game_kind(settings.name)
    assert kind is not None, settings.name
    english = getattr(settings, "telling", "plain") == "english"
    return ENGLISH[settings.name] if english else kind


def kind_in(section: Mapping[str, Any]) -> type[Game]:
    """Of the [game] of a run's config.toml; `Game` where nobody knows it any more."""
    kind = game_kind(str(section["name"])) or Game
    return ENGLISH.get(kind.name, kind) if section.get("telling") == "english" else kind


def corpus(game: Game, n: int, seed: int, names: Sequence[str] = ()) -> list[ScriptedDialogue]:
    """`n` dialogues over contexts of the training split; the same seed gives the same dialogues. They are
    held by the partners `names`, each as likely as it is often named, or by the game's own mixture.
    """
    rng = random.Random(seed)
    if isinstance(game, TextGame):
        return [game.scripted(rng) for _ in range(n)]
    script = SCRIPTS[game.name]
    if names:
        script = partial(script, mixture=Counter(names))
    return [script(game, game.sample(rng, "train"), rng) for _ in range(n)]
