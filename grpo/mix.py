"""Whom the groups of a step meet: a partner for each, by shares, and the side that the partner has.

A draw is a function of the seed of the step and the group's number among all groups of the step, so that any
number of ranks draws alike.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from duologue.rollout.seeds import derive_seed

SELF, START, FROZEN, POOL, SCRIPTED, ENDPOINT = "self", "start", "frozen", "pool", "scripted", "endpoint"
LAGGED = "lagged:"
PARTNER = r"self|start|frozen|lagged:[1-9]\d{0,8}|pool|scripted(:\w+)?|endpoint"
PARTNERS = "'self', 'frozen', 'lagged:k' with k of 1 or more, 'pool', 'start', 'scripted', 'scripted:NAME'"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Of a group in its step. `at`: how far into its partner's share it lies, from 0 to below 1, by which one
    of several snapshots or characters is chosen.
    """

    partner: str
    at: float


def places(parts: Mapping[str, float], groups: int, seed: int) -> list[Place]:
    """Systematic sampling: each group has a place of its own among `groups` evenly spaced ones, in an order
    and with an offset that follow from the seed of the step. So a partner with the part p is met by
    p * groups groups, rounded down or up, and by just as many on average.
    """
    rng = random.Random(derive_seed(seed, "mix"))
    order = list(range(groups))
    rng.shuffle(order)
    offset = rng.random()
    names, ends = list(parts), [*accumulate(parts.values())]
    ends[-1] = 1.0  # but for rounding
    drawn = []
    for place in order:
        point = min((place + offset) / groups, 1 - 2**-53)
        i = next(i for i, end in enumerate(ends) if point < end)
        start = ends[i - 1] if i else 0.0
        drawn.append(Place(names[i], min((point - start) / (ends[i] - start), 1 - 2**-53)))
    return drawn


def chosen(items: Sequence[T], at: float) -> T:
    """The item at a place from 0 to below 1."""
    return items[int(at * len(items))]


def side(step: int, group: int) -> int:
    """The partner's. It changes in a rhythm other than the first speaker's."""
    return (group // 2 + step // 2) % 2
