"""What the ranks of a run deal among them in a step: groups by how long they will take, rows by length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from duologue.grpo.packing import Row, split_rows
from duologue.grpo.world import World
from duologue.rollout.selfplay.dialogue import POLICY, Dialogue
from duologue.rollout.selfplay.speakers import Opponent

COUNTS = ("judge_asked", "judge_hits", "judge_failed")


class Lengths:
    """Sampled tokens of the last dialogues with each opponent: what is expected of the next ones. It decides
    who plays a group, never what comes of it.
    """

    def __init__(self) -> None:
        self._of: dict[str, float] = {}

    def expected(self, opponents: Sequence[Opponent | None]) -> list[float]:
        return [self._of.get(POLICY if o is None else o.name, 0.0) for o in opponents]

    def note(self, played: Iterable[tuple[tuple[str, str], int]]) -> None:
        """Of every dialogue of a step, on all ranks: who played, and how many tokens were sampled."""
        by_name: dict[str, list[int]] = {}
        for players, sampled in played:
            other = next((player for player in players if player != POLICY), POLICY)
            by_name.setdefault(other, []).append(sampled)
        self._of |= {name: sum(lengths) / len(lengths) for name, lengths in by_name.items()}


def sampled_tokens(dialogue: Dialogue) -> int:
    """Tokens that were drawn here."""
    return sum(len(turn.logprobs or ()) for turn in dialogue.turns)


def rows_of_all(rows: Sequence[Row], group_size: int, n_groups: int, world: World) -> Sequence[Row]:
    """Those of all ranks in the order of their groups, from those of this rank's own `n_groups` groups."""
    if world.size == 1:
        return rows
    by_group: list[list[Row]] = [[] for _ in range(n_groups)]
    for row in rows:
        by_group[row.dialogue_id // group_size].append(row)
    return [
        replace(row, dialogue_id=number * group_size + row.dialogue_id % group_size)
        for number, of_group in enumerate(world.gather(by_group))
        for row in of_group
    ]


def dealt(rows: Sequence[Row], world: World, shares: int = 0) -> Sequence[Row]:
    """This rank's part of rows that all hold alike, in shares of about the same number of tokens: as many as
    there are ranks, or as `shares` says, of which rank r has number r, r + ranks, and so on. Who played a
    row changes nothing.
    """
    n = shares or world.size
    if n == 1:
        return rows
    numbers = share_numbers([len(row.token_ids) for row in rows], n)
    return [
        replace(row, share=number)
        for row, number in zip(rows, numbers, strict=True)
        if number % world.size == world.rank
    ]


def share_numbers(sizes: Sequence[float], n: int) -> list[int]:
    """Of each item the share: the largest first, each to the share that has least."""
    loads, numbers = [0.0] * n, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        numbers[place] = loads.index(min(loads))
        loads[numbers[place]] += sizes[place]
    return numbers


def micro_batches(rows: Sequence[Row], max_tokens: int, world: World, shares: int = 0) -> list[list[Row]]:
    """Of this rank's shares in turn, the first of each, then the second of each, and so on; as many on every
    rank, for which some are empty.
    """
    own = [rows]
    if shares:
        numbers = range(world.rank, shares, world.size)
        own = [[row for row in rows if row.share == number] for number in numbers]
    cut = [split_rows(share, max_tokens) for share in own]
    most = int(world.most(max(map(len, cut))))  # world
    return [parts[i] if i < len(parts) else [] for i in range(most) for parts in cut]


def joint_costs(of_ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A judge's costs on all ranks: counts add up, means are weighted by what was asked, a wait is the
    longest.
    """
    if len(of_ranks) == 1:
        return dict(of_ranks[0])
    asked = [max(costs.get("judge_asked", 0.0), 0.0) for costs in of_ranks]
    joint = {}
    for name in dict.fromkeys(name for costs in of_ranks for name in costs):
        values = [costs.get(name, 0.0) for costs in of_ranks]
        if name in COUNTS:
            joint[name] = sum(values)
        elif name == "judge_wait_seconds":
            joint[name] = max(values)
        else:
            weighted = sum(n * value for n, value in zip(asked, values, strict=True))
            joint[name] = weighted / max(sum(asked), 1.0)
    return joint
