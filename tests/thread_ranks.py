"""Ranks of a run that are threads of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.config import Config
from duologue.grpo.console import Progress
from duologue.grpo.distributed.run_dir import FollowerDir, LeaderDir
from duologue.grpo.trainer import Trainer
from duologue.grpo.world import World
from torch import Tensor


class Meeting:
    """Where they exchange what they have."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=240)


class Rank(World):
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def each(self, value: Any) -> list[Any]:
        self.meeting.slots[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.slots)
        self.meeting.barrier.wait()
        return values

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[self.rank * len(items) // self.size : (self.rank + 1) * len(items) // self.size]

    def gather(self, items: Sequence[Any]) -> Sequence[Any]:
        return [item for part in self.each(list(items)) for item in part]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.each(list(numbers)), strict=True)]

    def most(self, number: float) -> float:
        return float(max(self.each(number)))

    def agree(self, flag: bool) -> bool:
        return any(self.each(flag))

    def scatter(self, flat: Tensor) -> Callable[[], list[Tensor]]:
        parts = [part.chunk(self.size)[self.rank].clone() for part in self.each(flat.clone())]
        return lambda: parts

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(torch.stack(self.each(tensor.clone())).sum(0))

    def join(self, flat: Tensor) -> None:
        own = flat.chunk(self.size)[self.rank]
        flat.copy_(torch.cat(self.each(own.clone())))


def on_ranks(size: int, work: Callable[[Rank], Any]) -> list[Any]:
    """What `work` returns on each; where one raises, the others do not wait."""
    meeting = Meeting(size)

    def of_rank(rank: int) -> Any:
        try:
            return work(Rank(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of_rank, range(size)))


def train_on_ranks(config: Config, path: Path, ranks: int) -> None:
    """A run, from its start or from where it is."""

    def work(rank: Rank) -> None:
        if rank.rank == 0:
            opened = LeaderDir.resume if path.exists() else LeaderDir.create
            leader: Any = opened(path, config.to_toml())
            leader.world = rank
        rank.agree(False)
        follower: Any = FollowerDir(path, rank)  # type: ignore[arg-type]
        of_rank = follower if rank.rank else leader
        Trainer(config, of_rank, Progress(quiet=True), threading.Event(), rank).run()
        of_rank.close()

    on_ranks(ranks, work)
