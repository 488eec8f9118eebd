"""RMS norm, the gate, rotary embedding and KV writes: the contracts, the calls of C++ and Triton, and the
`torch.library` ops. In all of them a row depends on itself alone.

Shapes: K length of a row, T tokens, H heads, D head dim, Hk key heads, P pages, B page size.
"""

from __future__ import annotations

from typing import Any

import torch
from duologue.kernels.backend import (
    DTYPES,
    as_dtype,
    check,
    device_type,
    lib,
    library_op,
    pointers,
    triton,
    with_gradients,
)
from torch import Tensor


def _shape(x: Tensor) -> tuple[int, int]:
    """(number of rows, length of a row)."""
    K = x.shape[-1]
    return x.numel() // max(K, 1), K


# ---- norms -------------------------------------------------------------------------------------------------


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, total); total is x itself without a residual."""
    x = x.contiguous()
    device = device_type(x)
    sizes, dtype = x.shape, x.dtype
    of_weight = (weight, sizes[-1:], dtype)
    total = x
    if residual is None:
        check("rms_norm", device, weight=of_weight)
    else:
        check("add_rms_norm", device, weight=of_weight, residual=(residual, sizes, dtype))
        residual = residual.contiguous()
        total = torch.empty_like(x)
    weight = weight.contiguous()
    out = torch.empty_like(x)
    if triton(x):
        from duologue.kernels.gpu import rows as gpu_rows

        return gpu_rows.rms_norm(x, residual, weight, eps, out, total)
    lib().rms_norm(*pointers(x, residual, weight, out, total), *_shape(x), eps, DTYPES[dtype])
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm(x, residual, weight, eps)


def rms_norm_backward(
    total: Tensor, weight: Tensor, eps: float, grad: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of the normed input, gradient of the weight). `grad_total` is added when the sum has another
    use."""
    total, weight, grad = map(Tensor.contiguous, (total, weight, grad))
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty_like(total)
    if triton(total):
        from duologue.kernels.gpu import rows as gpu_rows

        return gpu_rows.rms_norm_backward(total, weight, eps, grad, grad_total, grad_x)
    N, K = _shape(total)
    partial = total.new_empty(-(-N // 32), K, dtype=torch.float32)
    tensors = pointers(total, weight, grad, grad_total, grad_x, partial)
    lib().rms_norm_backward(*tensors, N, K, eps, DTYPES[total.dtype])
    return grad_x, as_dtype(partial.sum(0), weight.dtype)


rms_norm_op = library_op("rms_norm", rms_norm, 0)
add_rms_norm_op = library_op("add_rms_norm", add_rms_norm, 0, 0)
rms_norm_backward_op = library_op("rms_norm_backward", rms_norm_backward, 0, 1)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (*run(x, weight, ctx.eps, grad, None), None)


def _add_rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.eps = inputs[3]
    ctx.save_for_backward(output[1], inputs[2])


def _add_rms_norm_backward(run: Any, ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    grad_x, grad_weight = run(total, weight, ctx.eps, grad, grad_total)
    return grad_x, grad_x, grad_weight, None


_of_norm = (rms_norm_backward_op, rms_norm_backward)
rms_norm_grad = with_gradients(rms_norm_op, rms_norm, _rms_norm_setup, _rms_norm_backward, *_of_norm)
add_rms_norm_grad = with_gradients(
    add_rms_norm_op, add_rms_norm, _add_rms_norm_setup, _add_rms_norm_backward, *_of_norm
)


# ---- the gate ----------------------------------------------------------------------------------------------


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    check("silu_mul", device_type(gate), up=(up, gate.shape, gate.dtype))
    out = torch.empty_like(gate)
    if triton(gate):
        from duologue.kernels.gpu import rows as gpu_rows

        return gpu_rows.silu_mul(gate, up, None, out, out)[0]
    lib().silu_mul(*pointers(gate, up, out), *_shape(gate), DTYPES[gate.dtype])
    return out


def silu_mul_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    gate, up, grad = map(Tensor.contiguous, (gate, up, grad))
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if triton(gate):
        from duologue.kernels.gpu import rows as gpu_rows

        return gpu_rows.silu_mul(gate, up, grad, grad_gate, grad_up)
    tensors = pointers(gate, up, grad, grad_gate, grad_up)
    lib().silu_mul_backward(*tensors, *_shape(gate), DTYPES[gate.dtype])
    return grad_gate, grad_up


silu_mul_op = library_op("silu_mul", silu_mul, 0)
silu_mul_backward_op = library_op("silu_mul_backward", silu_mul_backward, 0, 1)


def _silu_mul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _silu_mul_backward(run: Any, ctx: Any, grad: Tensor) -> Any:
    return run(*ctx.saved_tensors, grad)


silu_mul_grad = with_gradients(
    silu_mul_op, silu_mul, _silu_mul_setup, _silu_mul_backward, silu_mul_backward_op, silu_mul_backward
)


# ---- rotary embedding --------------------------------------------------------------------------------------


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float = 1.0
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] and k [T, Hk, D], each head rotated by its token's position; back again with sign -1."""
    device = device_type(q)
    if q.dim() != 3:
        check("rope", device, x=(q, (None, None, None), None))
    T, _, D = q.shape
    if D % 2:
        raise ValueError(f"rope: the head dim is {D}, accepted is an even number")
    check(
        "rope",
        device,
        k=(k, (T, k.shape[1] if k.dim() == 3 else None, D), q.dtype),
        cos=(cos, (len(cos), D // 2), torch.float32),
        sin=(sin, cos.shape, torch.float32),
        positions=(positions, (T,), torch.int64),
    )
    return _rotated(q, k, cos, sin, positions, sign)


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float
) -> tuple[Tensor, Tensor]:
    """`rope` of tensors that have been checked, as those of a backward were in its forward."""
    q, k, cos, sin, positions = map(Tensor.contiguous, (q, k, cos, sin, positions))
    tables = (cos, sin, positions)
    outs = torch.empty_like(q), torch.empty_like(k)
    if triton(q):
        from duologue.kernels.gpu import rows as gpu_rows

        return gpu_rows.rotate(q, outs[0], *tables, sign), gpu_rows.rotate(k, outs[1], *tables, sign)
    at = pointers(*tables)
    most, dtype, (T, _, D) = cos.shape[0], DTYPES[q.dtype], q.shape
    for x, out in zip((q, k), outs, strict=True):
        bad = lib().rope(*pointers(x, out), *at, T, x.shape[1], D, most, sign, dtype)
        if bad:
            position = int(positions[bad - 1])
            raise ValueError(f"rope: positions[{bad - 1}] = {position}, accepted is 0 to {most - 1}")
    return outs


rope_op = library_op("rope", rope, 0, 1)


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.sign = inputs[5] if len(inputs) > 5 else 1.0
    ctx.save_for_backward(*inputs[2:5])


def _rope_backward(run: Any, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """A rotation's transpose is the rotation back."""
    of_tables = [None] * (len(ctx.needs_input_grad) - 2)
    return *run(*grads, *ctx.saved_tensors, -ctx.sign), *of_tables


rope_grad = with_gradients(rope_op, rope, _rope_setup, _rope_backward, rope_op, _rotated)


# ---- KV writes ---------------------------------------------------------------------------------------------


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    k, v = k.contiguous(), v.contiguous()
    device = device_type(k)
    check("write_kv", device, k=(k, (None, None, None), k_pages.dtype))
    T, Hk, D = k.shape
    check(
        "write_kv",
        device,
        v=(v, k.shape, k.dtype),
        k_pages=(k_pages, (None, None, Hk, D), k.dtype),
        v_pages=(v_pages, k_pages.shape, k.dtype),
        slots=(slots, (T,), torch.int64),
    )
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("write_kv: k_pages and v_pages must be contiguous, they are written in place")
    slots = slots.contiguous()
    if triton(k):
        from duologue.kernels.gpu import rows as gpu_rows

        gpu_rows.write_kv(k, v, k_pages, v_pages, slots)
        return
    P, B = k_pages.shape[:2]
    tensors = pointers(k, v, k_pages, v_pages, slots)
    bad = lib().write_kv(*tensors, T, P * B, Hk * D * k.element_size())
    if bad:
        slot = int(slots[bad - 1])
        raise ValueError(f"write_kv: slots[{bad - 1}] = {slot}, accepted is 0 to {P * B - 1}")
