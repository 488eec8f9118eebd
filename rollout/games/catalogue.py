"""The games by name, and the scripted negotiators of those that have some: where a new game is entered.
Games of users (text_game.py) need no entry: their names say where they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from duologue.rollout.games import deal_scripts, price
from duologue.rollout.games.deal import DealGame
from duologue.rollout.games.dilemma import AloneGame, DilemmaGame
from duologue.rollout.games.game import Game, GameSettings
from duologue.rollout.games.price import PriceGame
from duologue.rollout.games.priorities import Camper, PrioritiesGame
from duologue.rollout.games.scripted import ScriptedDialogue
from duologue.rollout.games.text_game import TextGame
from duologue.rollout.games.user_game import FORMS, is_named

Script = Callable[[Any, Any, random.Random], ScriptedDialogue]  # of a game, one of its scenarios, and draws

GAMES: dict[str, type[Game]] = {
    kind.name: kind for kind in (DealGame, PriceGame, PrioritiesGame, DilemmaGame, AloneGame)
}
SCRIPTS: dict[str, Script] = {
    "deal": deal_scripts.scripted_dialogue,
    "price": price.scripted_dialogue,
    "priorities": partial(deal_scripts.scripted_dialogue, kind=Camper),
}

ACCEPTED = f"one of {', '.join(map(repr, GAMES))}, or a game of your own: {FORMS}"


def game_kind(name: str) -> type[Game] | None:
    """The class of the game that is named, None where there is none."""
    return GAMES.get(name, TextGame if is_named(name) else None)


def kind_of(settings: GameSettings) -> type[Game]:
    """Of the settings of a game."""
    kind = game_kind(settings.name)
    assert kind is not None, settings.name
    return kind


def corpus(game: Game, n: int, seed: int) -> list[ScriptedDialogue]:
    """`n` dialogues over contexts of the training split; the same seed gives the same dialogues."""
    rng = random.Random(seed)
    if isinstance(game, TextGame):
        return [game.scripted(rng) for _ in range(n)]
    script = SCRIPTS[game.name]
    return [script(game, game.sample(rng, "train"), rng) for _ in range(n)]
