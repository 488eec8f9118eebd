"""train.gradient_accumulation_fusion: linears put the gradients of their weights where they are summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from duologue.grpo.distributed.optimizer import ReplicatedOptimizer
from duologue.grpo.distributed.sharded import ShardedOptimizer
from duologue.grpo.loss import LossConfig
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.packing import Row
from duologue.grpo.update import accumulate_policy_gradient
from duologue.kernels import gather, ops
from duologue.kernels.linear import add_weight_gradient
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from thread_ranks import on_ranks
from tiny import decoder, policy_rows
from torch import Tensor, nn

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def some_rows() -> list[Row]:
    return policy_rows([9, 14, 5, 20, 11])


def model_of(dtype: torch.dtype, rank: int = 0) -> Decoder:
    model = decoder(1, tie_word_embeddings=not rank).to(dtype)
    if not rank:
        return model
    adapter = new_adapter(model, LoraSettings(rank=rank, dropout=0.3), 0)
    for _, b in adapter.pairs.values():
        nn.init.normal_(b, generator=torch.Generator().manual_seed(0))
    return LoraDecoder(model, adapter)


def summed(model: Decoder, fuse: bool, recompute: str = "none") -> tuple[dict[str, Tensor], set[str]]:
    """The gradients of several micro-batches, and the parameters of which autograd was given one."""
    by_autograd: set[str] = set()

    def note(name: str) -> Callable[[Any], None]:
        return lambda gradient: by_autograd.add(name) if gradient is not None else None

    model.recompute = recompute
    optimizer = Optimizer(model, **SETTINGS, fuse=fuse)
    handles = [p.register_hook(note(name)) for name, p in optimizer.parameters.items()]
    how: Any = {"temperature": 1.0, "max_tokens": 25, "dropout_seed": 3, "backward": optimizer.backward}
    accumulate_policy_gradient(model, some_rows(), LossConfig(), after_part=optimizer.accumulate, **how)
    for name, parameter in optimizer.parameters.items():
        assert parameter.grad is None or parameter.grad is optimizer.masters[name].grad
    found = {name: m.grad.clone() for name, m in optimizer.masters.items() if m.grad is not None}
    for handle in handles:
        handle.remove()
    optimizer.close()
    return found, by_autograd


def test_a_step_without_a_gradient_moves_nothing_on_ranks_either() -> None:
    """Adapters over ranks: a step whose groups all taught nothing is no step of AdamW's, whose momentum and
    decay would go on; where one rank has a gradient, all take it.
    """

    def work(world: Any) -> tuple[dict[str, Tensor], float]:
        model = model_of(torch.float32, rank=4)
        optimizer = ReplicatedOptimizer(model, world=world, **SETTINGS)
        for has in ([True, True], [True, False], [False, False], [False, False]):
            if has[world.rank]:
                accumulate_policy_gradient(model, some_rows(), LossConfig(), temperature=1.0, max_tokens=4096)
            before = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
            optimizer.step(1e-2, optimizer.squared_grad_norm())
        moved = max(
            float((p - before[name]).detach().abs().max()) for name, p in optimizer.parameters.items()
        )
        return {name: p.detach().clone() for name, p in optimizer.parameters.items()}, moved

    (first, moved), (second, other) = on_ranks(2, work)
    assert moved == other == 0
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 13, 5), (3, 17, 96, 40), (300, 33, 65)])
def test_the_product_is_that_of_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *rows, K, O = shape
    draws = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(*rows, n, generator=draws).to(dtype) for n in (K, O))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (t.double().flatten(0, -2) for t in (grad, x))
    before = torch.randn(O, K, generator=draws).to(wide)
    bound = 4e-7 * len(a) ** 0.5 * (a.abs().T @ b.abs() + before.abs().double())
    empty = torch.full((O, K), torch.nan, dtype=wide)  # which nobody shall read
    for total, add in ((before.clone(), True), (empty, False)):
        add_weight_gradient(total, x, grad, add)
        expected = a.T @ b + (before.double() if add else 0)
        assert bool(((total.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("recompute", ["none", "norms", "layer"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gradients_are_those_of_autograd(dtype: torch.dtype, rank: int, recompute: str) -> None:
    """Which is given none of a matrix; what is made a second time changes no bit."""
    expected, usual = summed(model_of(dtype, rank), fuse=False)
    found, by_autograd = summed(model_of(dtype, rank), fuse=True, recompute=recompute)
    again, _ = summed(model_of(dtype, rank), fuse=True)
    assert found.keys() == expected.keys() == usual
    assert all(torch.equal(found[name], again[name]) for name in found)
    matrices = {name for name, gradient in found.items() if gradient.dim() == 2}
    assert by_autograd == usual - matrices
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() <= bound * gradient.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_s_gradient_is_summed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    """Of 5,000 tokens, most of which are one: sums in bf16 stop growing. In fp32 the bits are torch's."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=draws).to(dtype).requires_grad_()
    ids = torch.randint(0, 40, (5_000,), generator=draws) * (torch.rand(5_000, generator=draws) < 0.2)
    grad = torch.rand(5_000, 24, generator=draws).to(dtype)
    (found,) = torch.autograd.grad(gather.embedding(weight, ids), weight, grad)
    (torchs,) = torch.autograd.grad(nn.functional.embedding(ids, weight), weight, grad)
    exact = torch.zeros(40, 24, dtype=torch.float64).index_add_(0, ids, grad.double())
    assert found.dtype == dtype
    if dtype == torch.bfloat16:
        assert ((found.double() - exact).abs() <= 2**-8 * exact + 1e-3).all()
        assert (torchs[0].double() - exact[0]).abs().min() > 0.5 * exact[0].max()  # what is avoided
    else:
        assert torch.equal(found, torchs)


class Shared(nn.Module):
    """One weight in two linears, another in a linear and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.square = nn.Embedding(20, 8), nn.Linear(8, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for _ in range(2):
            x = ops.linear(x, self.square.weight)
        return ops.linear(x, self.table.weight).float().square().mean()


def shared(dtype: torch.dtype) -> Shared:
    module = Shared()
    for i, parameter in enumerate(module.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    return module.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["alone", "sharded", "replicated"])
def test_all_uses_of_a_shared_weight_are_added_up(kind: str, dtype: torch.dtype) -> None:
    """Over micro-batches and ranks, before a block is sent."""
    parts = [torch.arange(6) + 3 * i for i in range(4)]
    oracle = shared(dtype).double()
    for part in parts:
        oracle(part).backward()
    expected = float(nn.utils.clip_grad_norm_(oracle.parameters(), 1.0))

    def work(rank: Any) -> tuple[float, Any]:
        module = shared(dtype)
        kinds: dict[str, Any] = {"sharded": ShardedOptimizer, "replicated": ReplicatedOptimizer}
        where = {} if kind == "alone" else {"world": rank}
        optimizer = kinds.get(kind, Optimizer)(module, **SETTINGS, **where, fuse=True)
        for part in parts[rank.rank :: rank.size]:
            optimizer.backward(module(part))
            optimizer.accumulate()
        return optimizer.step(1e-3), [p.detach().clone() for p in module.parameters()]

    ranks = on_ranks(1 if kind == "alone" else 2, work)
    for norm, weights in ranks:
        assert norm == pytest.approx(expected, rel=2e-2 if dtype == torch.bfloat16 else 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(weights, ranks[0][1], strict=True))


def test_autograd_has_its_gradients_where_they_are_asked_for() -> None:
    """As whoever looks for the dialogue of a bad update does: nothing is added to the sums."""
    module = shared(torch.float32)
    optimizer = Optimizer(module, **SETTINGS, fuse=True)
    optimizer.backward(module(torch.arange(6)))
    before = [gradient.clone() for gradient in optimizer.gradients()]
    found = torch.autograd.grad(module(torch.arange(6)), [*module.parameters()])
    for a, b, c in zip(before, optimizer.gradients(), found, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
