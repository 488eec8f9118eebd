"""The C++ kernels as `torch.library` ops with gradients, so that autograd, torch.compile, DDP and FSDP see ordinary ops."""

from __future__ import annotations

from typing import Any

import torch
from duologue.kernels import backend
from torch import Tensor

# ---- linear ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("duologue::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, exact: bool = True
) -> Tensor:
    return backend.linear(x, weight, bias, out_dtype, exact)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, exact: bool = True) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


@torch.library.custom_op("duologue::linear_backward", mutates_args=())
def linear_backward(
    x: Tensor, weight: Tensor, grad: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = backend.linear_backward(
        x.flatten(0, -2), weight, grad.flatten(0, -2), need_x, need_weight
    )
    return grad_x.view(x.shape) if need_x else grad_x, grad_weight


@linear_backward.register_fake
def _(x: Tensor, weight: Tensor, grad: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x if need_x else x.new_empty(0)), torch.empty_like(
        weight if need_weight else x.new_empty(0)
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs[:3]
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _linear_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_x, grad_weight = linear_backward(x, weight, grad, need_x, need_weight)
    grad_bias = grad.flatten(0, -2).sum(0).to(x.dtype) if ctx.has_bias and need_bias else None
    return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias, None, None


linear.register_autograd(_linear_grad, setup_context=_linear_setup)

# ---- norms -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("duologue::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return backend.rms_norm(x, None, weight, eps)[0]


@torch.library.custom_op("duologue::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return backend.rms_norm(x, residual, weight, eps)


@torch.library.custom_op("duologue::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    total: Tensor, weight: Tensor, eps: float, grad: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    return backend.rms_norm_backward(total.contiguous(), weight, eps, grad, grad_total)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


@rms_norm_backward.register_fake
def _(
    total: Tensor, weight: Tensor, eps: float, grad: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(total, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (*rms_norm_backward(x, weight, ctx.eps, grad, None), None)


def _add_rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.eps = inputs[3]
    ctx.save_for_backward(output[1], inputs[2])


def _add_rms_norm_grad(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    grad_x, grad_weight = rms_norm_backward(total, weight, ctx.eps, grad, grad_total)
    return grad_x, grad_x, grad_weight, None


rms_norm.register_autograd(_rms_norm_grad, setup_context=_rms_norm_setup)
add_rms_norm.register_autograd(_add_rms_norm_grad, setup_context=_add_rms_norm_setup)

# ---- rope ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("duologue::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float) -> Tensor:
    return backend.rope(x, cos, sin, positions, sign)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sign = inputs[4]
    ctx.save_for_backward(*inputs[1:4])


def _rope_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (
        rope(grad, *ctx.saved_tensors, -ctx.sign),
        None,
        None,
        None,
        None,
    )  # a rotation's transpose is the rotation back


rope.register_autograd(_rope_grad, setup_context=_rope_setup)

# ---- silu_mul --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("duologue::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return backend.silu_mul(gate, up)


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("duologue::silu_mul_backward", mutates_args=())
def silu_mul_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return backend.silu_mul_backward(gate, up, grad)


@silu_mul_backward.register_fake
def _(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


def _silu_mul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _silu_mul_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = silu_mul_backward(*ctx.saved_tensors, grad)
    return grads


silu_mul.register_autograd(_silu_mul_grad, setup_context=_silu_mul_setup)
