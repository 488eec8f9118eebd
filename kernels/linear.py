"""linear and its gradients: the contracts, the calls of C++ and Triton, and the `torch.library` ops.

Shapes: M rows (all leading axes together), K in, O out.
"""

from __future__ import annotations

from typing import Any

import torch
from duologue.kernels import backend
from duologue.kernels.backend import DTYPES, check, lib, library_op, pointers, with_gradients
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """`ops.linear` by a kernel; `out`, contiguous, is written where it is given."""
    x, weight = x.contiguous(), weight.contiguous()
    dtype, sizes = x.dtype, weight.shape
    *rows, K = x.shape
    plain = bias is None and x.is_cpu and weight.is_cpu and weight.dtype == dtype
    if not plain or len(sizes) != 2 or sizes[1] != K:  # saves a small product a tenth of its time
        check("linear", x.device.type, weight=(weight, (None, K), dtype), bias=(bias, sizes[:1], dtype))
    bias = None if bias is None else bias.contiguous()
    O = sizes[0]
    if out is None:  # without a dtype and with sizes one by one in half the time
        out = x.new_empty(*rows, O) if out_dtype is None else x.new_empty(*rows, O, dtype=out_dtype)
    if out.dtype != dtype and out.dtype != torch.float32:
        raise ValueError(f"linear: out_dtype = {out_dtype}, accepted is {x.dtype} or torch.float32")
    if backend.triton(x):
        from duologue.kernels.gpu import linear as gpu_linear

        return gpu_linear.forward(x, weight, bias, out, exact)
    M = out.numel() // max(O, 1)
    addresses = x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
    lib().linear(*addresses, M, O, K, DTYPES[dtype], DTYPES[out.dtype])
    return out


def matmul(a: Tensor, b: Tensor, out: Tensor, sizes: tuple[int, int, int, int, int], add: bool) -> None:
    """out [I, C] (+)= A [I, R] @ b [R, C] in fp32, by C++.

    `sizes` are I, R, C and the strides of `a` along I and R, one of which is 1.
    """
    lib().matmul(*pointers(a, b, out), *sizes, add)


def matmul_tiles(a: Tensor, b: Tensor, out: Tensor, sizes: tuple[int, int, int, int, int], add: bool) -> None:
    """`matmul` of bf16 by tiles: `a` in bf16, or in fp32 and rounded; b in bf16; out in fp32, or in bf16
    where nothing is added to it."""
    lib().matmul_tiles(*pointers(a, b, out), *sizes, add, DTYPES[a.dtype], DTYPES[out.dtype])


def backward(
    x: Tensor, weight: Tensor, grad: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(grad [..., O] @ weight [O, K], grad^T @ x [..., K]); what is not needed is empty.

    On CPU not left to torch.mm: its OpenMP threads spin for milliseconds after each call and starve the
    workers of these kernels.
    """
    shape, dtype = x.shape, x.dtype
    if len(shape) != 2:
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    if not backend.cpp(x):
        grad = grad.to(dtype)
        grad_x = (grad @ weight).view(shape) if need_x else x.new_empty(0)
        return grad_x, grad.t() @ x if need_weight else x.new_empty(0)
    product, of_product = matmul_tiles, dtype
    if not backend.tiled(x):
        product, of_product = matmul, torch.float32
        x, weight, grad = x.float(), weight.float(), grad.float()
    x, weight, grad = x.contiguous(), weight.contiguous(), grad.contiguous()
    M, K = x.shape
    O = len(weight)
    grad_x = torch.empty_like(x, dtype=of_product) if need_x else x.new_empty(0)
    if need_x:
        product(grad, weight, grad_x, (M, O, K, O, 1), False)
        grad_x = grad_x.view(shape)
    grad_weight = torch.empty_like(weight, dtype=of_product) if need_weight else x.new_empty(0)
    if need_weight:
        product(grad, x, grad_weight, (O, M, K, 1, O), False)
    if of_product == dtype:
        return grad_x, grad_weight
    return grad_x.to(dtype), grad_weight.to(dtype)


# ---- torch.library ops -------------------------------------------------------------------------------------


forward_op = library_op(
    "linear",
    forward,
    schema="(Tensor x, Tensor weight, Tensor? bias, ScalarType? out_dtype, bool exact=True) -> Tensor",
)
backward_op = library_op("linear_backward", backward)


@forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or x.dtype)


@backward_op.register_fake
def _(x: Tensor, weight: Tensor, grad: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs[:3]
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_x, grad_weight = run(x, weight, grad, need_x, need_weight)
    grad_bias = grad.flatten(0, -2).sum(0).to(x.dtype) if ctx.has_bias and need_bias else None
    return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias, None, None


forward_grad = with_gradients(forward_op, forward, _setup, _backward, backward_op, backward)
