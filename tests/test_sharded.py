"""grpo/distributed/sharded.py: its ranks are threads here, its oracle is torch.optim.AdamW on the whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from duologue.grpo.distributed.sharded import ShardedOptimizer
from duologue.grpo.optimizer import Optimizer
from torch import Tensor, nn

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0}
ROWS = 12


class Meeting:
    """Where the threads of a test exchange what they have."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)


class Rank:
    """A rank of several, as `ShardedOptimizer` sees it."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def each(self, value: Any) -> list[Any]:
        self.meeting.slots[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.slots)
        self.meeting.barrier.wait()
        return values

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.each(list(numbers)), strict=True)]

    def agree(self, flag: bool) -> bool:
        return any(self.each(flag))

    def scatter_sum(self, flat: Tensor) -> Tensor:
        return sum(part.chunk(self.size)[self.rank] for part in self.each(flat.clone()))

    def join(self, shard: Tensor) -> Tensor:
        return torch.cat(self.each(shard.clone()))


def on_ranks(size: int, work: Callable[[Rank], Any]) -> list[Any]:
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Rank(meeting, rank) for rank in range(size)]))


def make_model(dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7)) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(7, 3, bias=False)})
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def backward(model: nn.Module, step: int, rows: slice) -> None:
    x = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(step))[rows]
    x = x.to(next(model.parameters()).dtype)
    for layer in model["layers"]:
        x = layer(x)
    model["head"](x).float().square().sum().backward()


def trained(
    rank: Rank, dtype: torch.dtype, steps: range, start: Any = None
) -> tuple[Any, Any, list[float], int]:
    """(weights, the first rank's state, gradient norms, bytes of this rank's state)"""
    model = make_model(dtype)
    if start is not None:
        model.load_state_dict(start[0])
    optimizer = ShardedOptimizer(model, world=rank, **SETTINGS)
    if start is not None:
        optimizer.load_state_dict(start[1])
    norms = []
    for step in steps:
        backward(model, step, slice(rank.rank, None, rank.size))
        optimizer.accumulate()
        norms.append(optimizer.step(0.01))
    held = [t for m in optimizer.masters.values() for t in (m, *optimizer._adamw.state[m].values())]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, optimizer.state_dict(), norms, sum(t.nbytes for t in held if t.dim())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_steps_of_ranks_equal_torch(size: int) -> None:
    model = make_model(torch.float32)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == flag] for flag in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    norms = []
    for step in range(8):
        backward(model, step, slice(None))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        theirs.step()
        theirs.zero_grad()
    ranks = on_ranks(size, lambda rank: trained(rank, torch.float32, range(8)))
    for weights, _, ours, _ in ranks:
        assert ours == pytest.approx(norms, rel=1e-5)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-6)
            assert torch.equal(weights[name], ranks[0][0][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_of_two_ranks_goes_on_with_three_and_with_one_process(dtype: torch.dtype) -> None:
    first = on_ranks(2, lambda rank: trained(rank, dtype, range(3)))[0]
    same = on_ranks(2, lambda rank: trained(rank, dtype, range(3, 3), first))
    three = on_ranks(3, lambda rank: trained(rank, dtype, range(3, 3), first))
    model = make_model(dtype)
    alone = Optimizer(model, **SETTINGS)
    model.load_state_dict(first[0])
    alone.load_state_dict(first[1])
    for state in (same[0][1], three[0][1], alone.state_dict()):
        assert state.keys() == first[1].keys()
        assert all(torch.equal(tensor, first[1][key]) for key, tensor in state.items())
    for weights in (same[0][0], three[2][0], model.state_dict()):
        assert all(torch.equal(tensor, first[0][key]) for key, tensor in weights.items())
    whole = on_ranks(2, lambda rank: trained(rank, dtype, range(6)))[0]
    resumed = on_ranks(2, lambda rank: trained(rank, dtype, range(3, 6), first))[0]
    assert all(torch.equal(tensor, whole[0][key]) for key, tensor in resumed[0].items())


def test_masters_and_moments_of_a_rank_are_its_share() -> None:
    (alone,) = on_ranks(1, lambda rank: trained(rank, torch.bfloat16, range(1)))
    for size in (2, 4):
        padding = (
            3 * 4 * (size - 1) * 5
        )  # three fp32 tensors, at most size - 1 numbers in each of five blocks
        for *_, held in on_ranks(size, lambda rank: trained(rank, torch.bfloat16, range(1))):
            assert alone[3] <= held * size <= alone[3] + padding


def test_without_a_gradient_on_any_rank_nothing_moves() -> None:
    def work(rank: Rank) -> bool:
        model = make_model(torch.float32)
        before = [p.detach().clone() for p in model.parameters()]
        ShardedOptimizer(model, world=rank, **SETTINGS).step(0.1)
        return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    assert on_ranks(2, work) == [True, True]


def test_a_norm_that_is_not_finite_leaves_all_as_it_was() -> None:
    def work(rank: Rank) -> bool:
        model = make_model(torch.float32)
        optimizer = ShardedOptimizer(model, world=rank, **SETTINGS)
        backward(model, 0, slice(rank.rank, None, rank.size))
        optimizer.step(0.01)
        before = [tensor.clone() for tensor in (*model.parameters(), *optimizer.state_dict().values())]
        backward(model, 1, slice(rank.rank, None, rank.size))
        if rank.rank == 1:
            next(model.parameters()).grad[0] = float("nan")
        with pytest.raises(RuntimeError, match="gradient norm is nan"):
            optimizer.step(0.01)
        after = [*model.parameters(), *optimizer.state_dict().values()]
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    assert on_ranks(2, work) == [True, True]
