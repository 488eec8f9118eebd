"""The characters of each game with each other: how often they agree, on what, and who gains by it.

    python -m bench.characters [--game deal] [--dialogues 300]

A row is a side, a column the partner that it meets, in held-out contexts, in both seats and with either
opener; five rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial
from statistics import fmean

from duologue.rollout.games.catalogue import GAMES, SIDES, characters
from duologue.rollout.games.game import Outcome
from duologue.rollout.games.scripted import meet
from duologue.rollout.games.selection import SelectionGame

ROUNDS = 5
SHOWN = {"deal": "pareto", "price": "efficiency", "priorities": "pareto"}  # beside agreement and own score


def pair(game: SelectionGame, one: str, other: str, n: int) -> tuple[list[Outcome], list[float]]:
    """Outcomes of `n` dialogues, and what `one` scored in them."""
    rng = random.Random(f"{one} {other}")
    outcomes, own = [], []
    for i in range(n):
        scenario, seat = game.sample(rng, "heldout"), i % 2
        names = (one, other) if seat == 0 else (other, one)
        side = partial(SIDES[game.name], game, scenario)
        outcomes.append(meet(game, scenario, names, rng, side, 2 * ROUNDS).outcome)
        own.append(outcomes[-1].scores[seat])
    return outcomes, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--game", choices=list(SIDES))
    parser.add_argument("--dialogues", type=int, default=300)
    args = parser.parse_args()
    found = []
    for name in [args.game] if args.game else SIDES:
        game = GAMES[name]()
        assert isinstance(game, SelectionGame)
        shown = SHOWN[name]
        print(f"\n{name}: agreement / {shown} / own score")
        print(f"{'':12}" + "".join(f"{other:>21}" for other in characters(name)))
        for one in characters(name):
            cells = []
            for other in characters(name):
                outcomes, own = pair(game, one, other, args.dialogues)
                means = game.summarise(outcomes)
                cells.append(f"{means['agreement']:.2f} / {means[shown]:.2f} / {fmean(own):4.1f}")
                kept = {"agreement": means["agreement"], shown: means[shown], "score": fmean(own)}
                found.append({"game": name, "side": one, "partner": other, **kept})
            print(f"{one:12}" + "".join(f"{cell:>21}" for cell in cells))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
