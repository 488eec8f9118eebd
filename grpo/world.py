"""Who trains together. Here it is one process, rank 0 of 1, and every method returns its argument.

The core calls these methods in a few lines marked `# world`; with many ranks another `World` takes the place
of this one, and nothing else of the core knows. Groups of dialogues are whole on a rank. What is a function
of all groups of a step (sums over tokens, a running baseline, ratings, the lines of a run) is made of what
`sum`, `most`, `agree` and `gather` return, alike on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class World:
    """`rank` of `size` processes."""

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of a list that all hold alike: the same places of every list of that length."""
        return items

    def hand_out(self, expected: Sequence[float]) -> Iterator[Sequence[int]]:
        """Numbers of the groups that this rank is to play, batch by batch, of as many as are `expected` to
        take that long; from then on `share` and `gather` go by who played which.
        """
        yield self.share(range(len(expected)))

    def gather(self, items: Sequence[T]) -> Sequence[T]:
        """The reverse of `share`: an item of this rank for each that it was dealt, those of all for all, in
        order.
        """
        return items

    def each(self, value: T) -> Sequence[T]:
        """What every rank says, by rank."""
        return [value]

    def sum(self, numbers: Sequence[float]) -> Sequence[float]:
        """Each number added up over the ranks."""
        return numbers

    def most(self, number: float) -> float:
        """The largest that a rank has."""
        return number

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return flag

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the ranks."""

    def scatter(self, flat: Tensor) -> Callable[[], Sequence[Tensor]]:
        """Begin to send each rank its part of this tensor; the call returned waits, and has this rank's part
        of every rank's tensor, by rank. All have tensors of equal size.
        """
        return lambda: [flat]

    def join(self, flat: Tensor) -> None:
        """In place: each rank's own part of this tensor becomes that part of every rank's. All have tensors
        of equal size.
        """

    def at_step(self, step: int) -> None:
        """Note how far this rank is, for whoever waits for it."""


ALONE = World()
