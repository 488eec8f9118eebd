"""Rows of a tensor by an index, an embedding's among them, and sums over them, whose bits are the same in
every run.

PyTorch adds rows of one number on CUDA (`index_add`, the backward of `index_select` and of an embedding) by
atomics, in any order, and in bf16 with a rounding each time, so that a sum of many stops growing. Here they
are summed in the order of the index, in fp32, and rounded once: by Triton on CUDA, on CPU by PyTorch, which
adds in order there.

Shapes: T rows by an index, U numbers in it, V rows of an embedding, H their length.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from duologue.kernels.backend import triton
from duologue.kernels.linear import gradient_place
from torch import Tensor


class Index:
    """`numbers` [T] int64, from 0 to U - 1."""

    def __init__(self, numbers: Tensor, size: int) -> None:
        self.numbers, self.size = numbers, size

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """(places [T] int64: those of number 0 in order, then those of 1; starts [U + 1] int64 of each)."""
        ranked, places = self.numbers.sort(stable=True)
        return places, torch.searchsorted(ranked, torch.arange(self.size + 1, device=ranked.device))

    def take(self, x: Tensor) -> Tensor:
        """x [U, ...] -> [T, ...], row t being x[numbers[t]]. Differentiable."""
        if torch.is_grad_enabled() and x.requires_grad:
            taken: Tensor = _Take.apply(x, self)  # type: ignore[no-untyped-call]
            return taken
        return x.index_select(0, self.numbers)

    def sum(self, x: Tensor) -> Tensor:
        """x [T, ...] -> [U, ...], row u being the sum of the rows of number u. Differentiable."""
        if triton(x):
            added: Tensor = _Sum.apply(x, self)  # type: ignore[no-untyped-call]
            return added
        return x.new_zeros(self.size, *x.shape[1:]).index_add(
            0, self.numbers, x
        )  # torch.func sees through it


def _sum(x: Tensor, index: Index) -> Tensor:
    if triton(x):
        from duologue.kernels.gpu import gather as gpu_gather

        return gpu_gather.sum_rows(x.contiguous(), *index.order, x.new_empty(index.size, *x.shape[1:]))
    return _added_up(torch.Size((index.size, *x.shape[1:])), index.numbers, x)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Index) -> Tensor:
        ctx.index = index
        return x.index_select(0, index.numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.index), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Index) -> Tensor:
        ctx.index = index
        return _sum(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.index.numbers), None


def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """weight [V, H], ids [T] int64 -> [T, H]. Differentiable.

    The gradient is summed in fp32, or wider for a wider weight, and rounded once; or it is added to where the
    weight's gradients are put (linear.PLACE), of which only the rows of these ids are read and written.
    """
    if torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling():
        taken: Tensor = _Embedding.apply(weight, ids)  # type: ignore[no-untyped-call]
        return taken
    return torch.nn.functional.embedding(ids, weight)


def add_rows(total: Tensor, ids: Tensor, x: Tensor) -> None:
    """total [V, H], fp32 or wider: its row ids[t] += x[t] of x [T, H], for every t, in order."""
    if triton(x):
        from duologue.kernels.gpu import gather as gpu_gather

        gpu_gather.add_rows(total, *ids.sort(stable=True), x.contiguous())
    else:
        total.index_add_(0, ids, x.to(total.dtype))


def _added_up(shape: torch.Size, numbers: Tensor, x: Tensor) -> Tensor:
    """`add_rows` to zeros of this shape, rounded once to x's type."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(shape, dtype=wide, device=x.device)
    add_rows(total, numbers, x)
    return total.to(x.dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.parameter = weight if weight.is_leaf else None
        ctx.shape = weight.shape
        return weight.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        if place := gradient_place(ctx.parameter):
            total, add = place()
            add_rows(total if add else total.zero_(), ids, grad)
            return None, None
        return _added_up(ctx.shape, ids, grad), None
