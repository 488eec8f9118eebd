"""grpo/distributed/sharded.py: its ranks are threads here, its oracle is torch.optim.AdamW on the whole."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from duologue.grpo.distributed.sharded import ShardedOptimizer
from duologue.grpo.distributed.tree import TreeSum
from duologue.grpo.optimizer import Optimizer
from thread_ranks import Rank, on_ranks
from torch import nn

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0}
ROWS = 12


def make_model(dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7)) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(7, 3, bias=False)})
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def backward(model: nn.Module, step: int, rows: slice, scale: float = 1.0) -> None:
    x = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(step))[rows] * scale
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
        optimizer = ShardedOptimizer(model, world=rank, **SETTINGS)
        optimizer.accumulate()
        assert float(optimizer.squared_grad_norm()) == 0
        ShardedOptimizer(model, world=rank, **SETTINGS).step(0.1)
        return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    assert on_ranks(2, work) == [True, True]


def test_a_norm_that_is_not_finite_leaves_all_as_it_was() -> None:
    def work(rank: Rank) -> bool:
        model = make_model(torch.float32)
        optimizer = ShardedOptimizer(model, world=rank, **SETTINGS)
        backward(model, 0, slice(rank.rank, None, rank.size))
        optimizer.accumulate()
        optimizer.step(0.01)
        before = [tensor.clone() for tensor in (*model.parameters(), *optimizer.state_dict().values())]
        backward(model, 1, slice(rank.rank, None, rank.size), scale=float("nan") if rank.rank else 1.0)
        optimizer.accumulate()
        with pytest.raises(RuntimeError, match="gradient norm is nan"):
            optimizer.step(0.01)
        after = [*model.parameters(), *optimizer.state_dict().values()]
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    assert on_ranks(2, work) == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_shares_give_the_same_bits_for_any_number_of_ranks(dtype: torch.dtype) -> None:
    """Two rounds of four shares an update; one process, two and four; and two that go on where four were."""

    def work(rank: Rank, steps: range, start: Any = None) -> tuple[Any, Any, list[float]]:
        model = make_model(dtype)
        if start is not None:
            model.load_state_dict(start[0])
        optimizer = ShardedOptimizer(model, world=rank, shares=4, **SETTINGS)
        if start is not None:
            optimizer.load_state_dict(start[1])
        norms = []
        for step in steps:
            for round_ in range(2):
                for share in range(rank.rank, 4, rank.size):
                    if (step, round_, share) != (1, 1, 2):  # an empty one
                        backward(model, step, slice(share + 4 * round_, None, 8))
                    assert all(p.grad is None for p in model.parameters())
                    optimizer.accumulate()
            norms.append(optimizer.step(0.01))
        return copy.deepcopy(model.state_dict()), optimizer.state_dict(), norms

    whole = [on_ranks(size, lambda rank: work(rank, range(4)))[0] for size in (1, 2, 4)]
    first = on_ranks(4, lambda rank: work(rank, range(2)))[0]
    (*later, norms) = on_ranks(2, lambda rank: work(rank, range(2, 4), first))[0]
    for weights, state, seen in (*whole, (*later, first[2] + norms)):
        assert seen == whole[0][2]
        assert all(torch.equal(value, whole[0][0][name]) for name, value in weights.items())
        assert all(torch.equal(value, whole[0][1][name]) for name, value in state.items())
    by_two = on_ranks(2, lambda rank: trained(rank, dtype, range(4)))[0]
    assert any(not torch.equal(value, whole[0][0][name]) for name, value in by_two[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_the_hosts_memory_give_the_same_bits(dtype: torch.dtype) -> None:
    """Alone and sharded; here the copies are within one memory."""

    def work(rank: Rank, offload: bool) -> tuple[Any, ...]:
        alone, shared = make_model(dtype), make_model(dtype)
        whole = Optimizer(alone, **SETTINGS, offload=offload)
        part = ShardedOptimizer(shared, world=rank, **SETTINGS, offload=offload)
        for step in range(3):
            backward(alone, step, slice(None))
            whole.step(0.01)
            backward(shared, step, slice(rank.rank, None, rank.size))
            part.accumulate()
            part.step(0.01)
        tensors = (*alone.parameters(), *shared.parameters(), *whole.state_dict().values())
        return (*tensors, *part.state_dict().values())

    for there, here in zip(
        *(on_ranks(2, lambda rank, o=o: work(rank, o)) for o in (True, False)), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize("leaves", [1, 3, 8])
def test_a_tree_sum_is_exact_where_the_terms_are_and_the_same_whoever_brings_them(leaves: int) -> None:
    generator = torch.Generator().manual_seed(leaves)
    whole = torch.randint(-1000, 1000, (2 * leaves, 5), generator=generator).float()
    tree = TreeSum(leaves)
    for term in whole.clone():
        tree.add(term)
        tree.own()
        assert len(tree._open) <= math.log2(leaves) + 1
    assert torch.equal(tree.total, whole.sum(0))
