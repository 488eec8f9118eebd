"""A game of which everything is known, to measure how a policy learns: at each of its turns a side has four
words to choose from, and one of them is right. Seeds 2 n and 2 n + 1 are one game with the sides swapped.
"""

from __future__ import annotations

import random

WORDS = ("a", "b", "c", "d")


class Words:
    """`turns` of each side. A side scores the share of its words that are right, or with `whole` 1 if all
    are, and besides `luck` times a number that it was dealt.
    """

    def __init__(self, turns: int = 2, whole: bool = False, luck: float = 0.0) -> None:
        self.turns, self.whole, self.luck = turns, whole, luck

    def reset(self, seed: int) -> None:
        rng = random.Random(seed // 2)
        dealt, opener = [rng.randrange(4), rng.randrange(4)], rng.randrange(2)
        self.swapped = seed % 2
        self.dealt = dealt[::-1] if self.swapped else dealt
        self.opener = (opener + self.swapped) % 2
        self.right: list[list[bool]] = [[], []]
        self.moves = 0

    def told(self, side: int) -> str:
        return f"you have {self.dealt[side]}"

    def observe(self) -> tuple[int, str]:
        side = (self.opener + self.moves) % 2
        return side, f"turn {len(self.right[side])}"

    def legal(self) -> list[str]:
        return [*WORDS]

    def step(self, text: str) -> bool:
        right = self.right[(self.opener + self.moves) % 2]
        right.append(text == WORDS[len(right) % 4])
        self.moves += 1
        return self.moves == 2 * self.turns

    def scores(self) -> tuple[float, float]:
        first, second = (
            float(sum(right) == self.turns) if self.whole else sum(right) / self.turns for right in self.right
        )
        return first + self.luck * self.dealt[0], second + self.luck * self.dealt[1]

    def scores_so_far(self) -> tuple[float, float]:
        return self.scores()
