"""linear and its gradients: the contracts, the calls of C++ and Triton, and the `torch.library` ops.

Shapes: M rows (all leading axes together), K in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from duologue.kernels import backend
from duologue.kernels.backend import (
    DTYPES,
    as_dtype,
    check,
    device_type,
    lib,
    library_op,
    pointers,
    with_gradients,
)
from torch import Tensor

# The attribute of a weight whose gradients somebody adds up: (the sum [O, K], fp32 or wider, whether there is
# anything in it) where a backward puts its product itself, and gives autograd none.
PLACE = "gradient_place"
Place = Callable[[], tuple[Tensor, bool]]


def gradient_place(weight: Tensor | None) -> Place | None:
    """Of a weight, None where autograd takes its gradient."""
    place: Place | None = getattr(weight, PLACE, None)
    return place


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
        check("linear", device_type(x), weight=(weight, (None, K), dtype), bias=(bias, sizes[:1], dtype))
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
    lib().linear(*pointers(x, weight, bias, out), M, O, K, DTYPES[dtype], DTYPES[out.dtype])
    return out


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    sizes: tuple[int, int, int, int, int],
    add: bool,
    narrow: bool = False,
) -> None:
    """out [I, C] (+)= A [I, R] @ b [R, C] by C++.

    `sizes` are I, R, C and the strides of `a` along I and R, one of which is 1. All are fp32; `narrow`, by
    instructions that multiply bf16: `a` in bf16, or in fp32 and rounded; b in bf16; out in fp32, or in bf16
    where nothing is added to it.
    """
    if narrow:
        lib().matmul_bf16(*pointers(a, b, out), *sizes, add, DTYPES[a.dtype], DTYPES[out.dtype])
    else:
        lib().matmul(*pointers(a, b, out), *sizes, add)


def backward(
    x: Tensor | None, weight: Tensor | None, grad: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(grad [..., O] @ weight [O, K], grad^T @ x [..., K]); what is not needed is empty, and nor is the other
    factor.

    On CPU not left to torch.mm: its OpenMP threads spin for milliseconds after each call and starve the
    workers of these kernels.
    """
    like = weight if x is None else x
    assert like is not None
    dtype, rows = like.dtype, _rows(grad)
    grad_x = grad_weight = None
    if not backend.cpp(like):
        rows = rows.to(dtype)
        if need_x:
            assert weight is not None
            grad_x = (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
        if need_weight:
            assert x is not None
            grad_weight = rows.t() @ _rows(x)
        return _given(grad_x, like), _given(grad_weight, like)
    narrow = backend.multiplies_bf16(like)
    of_product = dtype if narrow else torch.float32
    rows = _operand(rows, narrow)
    M, O = rows.shape
    if need_x:
        assert weight is not None
        K = weight.shape[1]
        grad_x = weight.new_empty((*grad.shape[:-1], K), dtype=of_product)
        matmul(rows, _operand(weight, narrow), grad_x, (M, O, K, O, 1), False, narrow)
    if need_weight:
        assert x is not None
        K = x.shape[-1]
        grad_weight = x.new_empty((O, K), dtype=of_product)
        matmul(rows, _operand(_rows(x), narrow), grad_weight, (O, M, K, 1, O), False, narrow)
    return _given(grad_x, like), _given(grad_weight, like)


def _rows(x: Tensor) -> Tensor:
    """[..., K] as [rows, K]."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    """In the dtype of its factor; empty where it was not needed, for an op returns tensors."""
    return like.new_empty(0) if grad is None else as_dtype(grad, like.dtype)


def _operand(factor: Tensor, narrow: bool) -> Tensor:
    """As the product of C++ takes it, which multiplies bf16 where it is `narrow`."""
    return (factor if narrow else as_dtype(factor, torch.float32)).contiguous()


def add_weight_gradient(total: Tensor, x: Tensor, grad: Tensor, add: bool) -> None:
    """total [O, K], fp32 or wider, (+)= grad [..., O]^T @ x [..., K] in one product: where nothing is added,
    what is there is not read.
    """
    x, rows = _rows(x), _rows(grad)
    if backend.cpp(x):
        narrow = backend.multiplies_bf16(x)
        (M, O), K = rows.shape, x.shape[1]
        matmul(_operand(rows, narrow), _operand(x, narrow), total, (O, M, K, 1, O), add, narrow)
    elif x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        how: Any = {"beta": int(add), "out_dtype": torch.float32}
        torch.addmm(total, rows.to(x.dtype).t(), x, out=total, **how)
    else:
        torch.addmm(total, rows.to(total.dtype).t(), x.to(total.dtype), beta=int(add), out=total)


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
def _(
    x: Tensor | None, weight: Tensor | None, grad: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    like = weight if x is None else x
    assert like is not None
    of_x = (*grad.shape[:-1], like.shape[-1]) if need_x else (0,)
    return like.new_empty(of_x), like.new_empty((grad.shape[-1], like.shape[-1]) if need_weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs[:3]
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.dtype_of_bias = None if bias is None else bias.dtype
    ctx.parameter = weight if need_weight and weight.is_leaf else None
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _backward(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    place = gradient_place(ctx.parameter)
    if place is not None and need_weight:
        total, add = place()
        add_weight_gradient(total, x, grad, add)
        need_weight = False
    grad_x, grad_weight = run(x, weight, grad, need_x, need_weight) if need_x or need_weight else (None, None)
    grad_bias = _rows(grad).sum(0).to(ctx.dtype_of_bias) if need_bias else None
    return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias, None, None


forward_grad = with_gradients(forward_op, forward, _setup, _backward, backward_op, backward)
