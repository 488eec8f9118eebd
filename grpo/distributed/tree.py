"""A sum whose bits do not depend on who brings the terms, nor when: its order is fixed."""

from __future__ import annotations

from torch import Tensor


class TreeSum:
    """Of rounds of `leaves` terms each: a round is added in a binary tree, the rounds one after the other.

    a   b   c   d   e        (a + b) + (c + d) and then + e
    `-+-'   `-+-'   |
      `---+---'     |        at most log2(leaves) + 1 sums are held at a time
          `----+----'
    """

    def __init__(self, leaves: int) -> None:
        self.leaves = leaves
        self.total: Tensor | None = None
        self._open: list[tuple[int, Tensor]] = []  # (level, sum) of subtrees that have no partner yet
        self._n = 0  # terms of this round

    def add(self, term: Tensor) -> None:
        """The term's memory is the sum's from now on."""
        level = 0
        while self._open and self._open[-1][0] == level:
            term = self._open.pop()[1].add_(term)
            level += 1
        self._open.append((level, term))
        self._n += 1
        if self._n == self.leaves:
            self._end_round()

    def _end_round(self) -> None:
        *others, (_, whole) = self._open
        for _, term in reversed(others):
            whole = term.add_(whole)
        self.total = whole if self.total is None else self.total.add_(whole)
        self._open, self._n = [], 0

    def own(self) -> None:
        """Copy what is a part of somebody else's larger memory, so that this can go."""

        def own(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

        self._open = [(level, own(term)) for level, term in self._open]
        self.total = None if self.total is None else own(self.total)
