"""A game that any policy earns something in, so that a step of a tiny model from nothing has advantages to
learn from: whoever says more different letters gets more.
"""

from __future__ import annotations


class Letters:
    """Both speak twice; nothing is agreed."""

    def reset(self, seed: int) -> None:
        self.least = seed % 3
        self.said: list[list[str]] = [[], []]

    def observe(self) -> tuple[int, str]:
        turns = len(self.said[0]) + len(self.said[1])
        return turns % 2, f"say more than {self.least} letters ."

    def legal(self) -> list[str]:
        return ["a b c d", "e f g", "h i", "j"]

    def step(self, text: str) -> bool:
        turns = len(self.said[0]) + len(self.said[1])
        self.said[turns % 2].append(text)
        return turns == 3

    def scores_so_far(self) -> tuple[float, float]:
        return self.scores()

    def scores(self) -> tuple[float, float]:
        first, second = (max(len(set("".join(said))) - self.least, 0) / 20 for said in self.said)
        return min(first, 1.0), min(second, 1.0)
