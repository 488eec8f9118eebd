"""The ranks of a run as they are: processes that torchrun started, which meet through torch.distributed.

Tensors go through `group` (NCCL on CUDA, gloo on CPU), Python objects through a gloo group of their own, so
that no small message waits for a kernel. Every wait ends after `timeout_s`: who is late is then named
(grpo/distributed/watch.py).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from duologue.grpo.distributed.watch import Watch
from duologue.grpo.world import World
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

T = TypeVar("T")
FIRST_SHARE = 0.75  # of its fair share of groups is a rank's first batch; the others are single groups


class Ranks(World):
    """This process among those of a run; made once, by the command line."""

    def __init__(self, device: str, timeout_s: float) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        limit = datetime.timedelta(seconds=timeout_s)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and self.rank == 0
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        base = TCPStore(address, port, is_master=ours, timeout=limit)
        self.store = PrefixStore(f"duologue/{attempt}", base)
        beside = TCPStore(address, port, is_master=False, timeout=limit)  # no wait of the other blocks it
        self.watch = Watch(PrefixStore(f"duologue/{attempt}/watch", beside), self.rank, self.size, timeout_s)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        self.device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else "cpu"
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.size, timeout=limit
        )
        self.group = dist.group.WORLD
        self.objects = dist.new_group(backend="gloo", timeout=limit)
        self._calls = 0  # of `hand_out`
        self._dealt: list[list[int]] | None = None  # by rank: the groups that it played
        self._here: list[int] = []

    # ---- who plays what ------------------------------------------------------------------------------------

    def share(self, items: Sequence[T]) -> Sequence[T]:
        if self._dealt is not None and sum(map(len, self._dealt)) == len(items):
            return [items[place] for place in self._dealt[self.rank]]
        return items[self.rank * len(items) // self.size : (self.rank + 1) * len(items) // self.size]

    def hand_out(self, expected: Sequence[float]) -> Iterator[Sequence[int]]:
        """From one queue, the longest first: a rank takes the next batch when it is through with the last."""
        self._calls += 1
        self._dealt, mine = None, []
        queue = batches(expected, self.size)
        while (ticket := self.store.add(f"handed_out/{self._calls}", 1) - 1) < len(queue):
            mine += queue[ticket]
            yield queue[ticket]
        self._here = mine

    def gather(self, items: Sequence[T]) -> Sequence[T]:
        if self._dealt is None:
            self._dealt = self.each(self._here)
        parts = self.each(list(items))
        if [len(part) for part in parts] != [len(places) for places in self._dealt]:
            raise RuntimeError(f"ranks gather {[*map(len, parts)]} items, not {[*map(len, self._dealt)]}")
        placed = sorted(
            (place, at, rank) for rank, places in enumerate(self._dealt) for at, place in enumerate(places)
        )
        return [parts[rank][at] for _, at, rank in placed]

    # ---- what all say --------------------------------------------------------------------------------------

    def each(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with self.watch.waiting():
            dist.all_gather_object(values, value, group=self.objects)
        return values

    def sum(self, numbers: Sequence[float]) -> Sequence[float]:
        return [sum(column) for column in zip(*self.each(list(numbers)), strict=True)]

    def most(self, number: float) -> float:
        return max(self.each(number))

    def agree(self, flag: bool) -> bool:
        return any(self.each(flag))

    def at_step(self, step: int) -> None:
        self.watch.step = step

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the ranks."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self.watch.waiting():
            dist.all_reduce(flat, group=self.group)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def scatter(self, flat: Tensor) -> Callable[[], Sequence[Tensor]]:
        """On CUDA by NCCL's stream, beside what is computed meanwhile."""
        parts = torch.empty_like(flat)
        with self.watch.waiting():
            work = dist.all_to_all_single(parts, flat, group=self.group, async_op=True)

        def received() -> Sequence[Tensor]:
            with self.watch.waiting():
                work.wait()
            return parts.chunk(self.size)

        return received

    def join(self, flat: Tensor) -> None:
        with self.watch.waiting():
            dist.all_gather_into_tensor(flat, flat.chunk(self.size)[self.rank], group=self.group)

    @property
    def round(self) -> int:
        """Which of its rounds of handing out groups the run is in."""
        return self._calls

    def close(self) -> None:
        """At the end of a run that went well: no rank leaves before all are here."""
        self.each(None)
        self.watch.end()
        dist.destroy_process_group()


def batches(expected: Sequence[float], size: int) -> list[list[int]]:
    """The queue of groups: first a large batch for each rank, dealt like cards from the longest, then one
    group at a time, so that the engines are full at first and the ranks end together.
    """
    order = sorted(range(len(expected)), key=lambda number: (-expected[number], number))
    first = int(FIRST_SHARE * len(order) / size) or 1
    head, tail = order[: first * size], order[first * size :]
    queue = [sorted(head[rank::size]) for rank in range(size)]
    return [batch for batch in queue if batch] + [[number] for number in tail]


def environment() -> dict[str, int]:
    """What torchrun says of this process; empty where it did not start it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: int(os.environ[name]) for name in names} if "TORCHELASTIC_RUN_ID" in os.environ else {}
