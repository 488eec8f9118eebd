"""The games with scripted negotiators, by name: what a new game is entered in."""

from __future__ import annotations

import random
from typing import Any

from duologue.rollout.games import deal_scripts, price, priorities
from duologue.rollout.games.common import ScriptedDialogue
from duologue.rollout.games.deal import DealGame
from duologue.rollout.selfplay.scenario import Game

GAMES: dict[str, tuple[Any, Any]] = {  # name: (its class, one of its scripted dialogues)
    "deal": (DealGame, deal_scripts.scripted_dialogue),
    "price": (price.PriceGame, price.scripted_dialogue),
    "priorities": (priorities.PrioritiesGame, priorities.scripted_camp),
}


def corpus(game: Game, n: int, seed: int) -> list[ScriptedDialogue]:
    """`n` dialogues over contexts of the training split; the same seed gives the same dialogues."""
    script, rng = GAMES[game.name][1], random.Random(seed)
    return [script(game, game.sample(rng, "train"), rng) for _ in range(n)]
