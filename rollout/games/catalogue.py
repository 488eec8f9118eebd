"""The games with scripted negotiators, by name: where a new one is entered."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from duologue.rollout.games import deal, deal_scripts, price, priorities
from duologue.rollout.games.common import ScriptedDialogue
from duologue.rollout.games.game import Game

GAMES: dict[
    str, tuple[Any, Any]
] = {  # name: (its class, a function of game, scenario and generator to one scripted dialogue)
    "deal": (deal.DealGame, deal_scripts.scripted_dialogue),
    "price": (price.PriceGame, price.scripted_dialogue),
    "priorities": (
        priorities.PrioritiesGame,
        partial(deal_scripts.scripted_dialogue, kind=priorities.Camper),
    ),
}


def corpus(game: Game, n: int, seed: int) -> list[ScriptedDialogue]:
    """`n` dialogues over contexts of the training split; the same seed gives the same dialogues."""
    script, rng = GAMES[game.name][1], random.Random(seed)
    return [script(game, game.sample(rng, "train"), rng) for _ in range(n)]
