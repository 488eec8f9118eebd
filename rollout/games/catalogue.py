"""The games by name, and the scripted negotiators of those that have some: where a new game is entered."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from duologue.rollout.games import deal_scripts, price
from duologue.rollout.games.deal import DealGame
from duologue.rollout.games.dilemma import AloneGame, DilemmaGame
from duologue.rollout.games.game import Game
from duologue.rollout.games.price import PriceGame
from duologue.rollout.games.priorities import Camper, PrioritiesGame
from duologue.rollout.games.scripted import ScriptedDialogue

Script = Callable[[Any, Any, random.Random], ScriptedDialogue]  # of a game, one of its scenarios, and draws

GAMES: dict[str, type[Game]] = {
    kind.name: kind for kind in (DealGame, PriceGame, PrioritiesGame, DilemmaGame, AloneGame)
}
SCRIPTS: dict[str, Script] = {
    "deal": deal_scripts.scripted_dialogue,
    "price": price.scripted_dialogue,
    "priorities": partial(deal_scripts.scripted_dialogue, kind=Camper),
}


def corpus(game: Game, n: int, seed: int) -> list[ScriptedDialogue]:
    """`n` dialogues over contexts of the training split; the same seed gives the same dialogues."""
    script, rng = SCRIPTS[game.name], random.Random(seed)
    return [script(game, game.sample(rng, "train"), rng) for _ in range(n)]
