"""The contracts of the kernels, checked, and their calls: C++ for CPU tensors of fp32 or bf16, Triton for CUDA's, fp16 too.

`DUOLOGUE_CPU=generic|avx2|avx512` forces an instruction set (read here, once); without it the best that runs is used. When the
library was not built (no C++ compiler at installation) `available()` is False and the ops use plain PyTorch. With
TRITON_INTERPRET=1 Triton's interpreter serves CPU tensors too, in place of C++: slow, for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

try:
    import duologue.kernels._cpu as _built

    _lib: ModuleType | None = _built
except ImportError:
    _lib = None

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ISAS = ("generic", "avx2", "avx512")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETS = _HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def use(isa: str) -> None:
    """Choose the instruction set by name; "" is the best that runs here."""
    if _lib is None:
        raise ValueError(f"DUOLOGUE_CPU = {isa!r}: the C++ kernels are not built, nothing can be chosen")
    if not _lib.use(isa):
        raise ValueError(
            f"DUOLOGUE_CPU = {isa!r}: accepted is one of {', '.join(ISAS)} that this machine can run"
        )


if os.environ.get("DUOLOGUE_CPU"):
    use(os.environ["DUOLOGUE_CPU"])


def lib() -> ModuleType:
    assert _lib is not None
    return _lib


def available() -> bool:
    return _lib is not None


def describe() -> str:
    """One line on what serves CPU tensors."""
    if _lib is None:
        return "PyTorch (the C++ kernels are not built)"
    return f"C++ {_lib.name()}, {_lib.threads()} threads"


def cpp(x: Tensor) -> bool:
    """Whether the C++ kernels take a tensor of this device and dtype."""
    return _lib is not None and x.device.type == "cpu" and x.dtype in DTYPES and not _INTERPRETS


def pointers(*tensors: Tensor | None) -> list[int]:
    """Their addresses, 0 for None. The tensors must stay alive while these are used."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def triton(x: Tensor) -> bool:
    """Whether the Triton kernels take a tensor of this device and dtype."""
    there = (x.is_cuda and _HAS_TRITON) or _INTERPRETS
    return there and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor) -> bool:
    return cpp(x) or triton(x)


def family(name: str) -> Any:
    """The module of this family of Triton kernels, imported when first needed."""
    return importlib.import_module(f"duologue.kernels.gpu.{name}")


def check(
    op: str,
    name: str,
    x: Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | None,
    device: str = "cpu",
) -> None:
    """Raise ValueError unless `x` has this shape (None = any size), dtype (None = any) and type of device."""
    if len(x.shape) != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, x.shape, strict=True)
    ):
        wanted = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, accepted is ({wanted})")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{op}: {name} is {x.dtype}, accepted is {dtype}")
    if x.device.type != device:
        raise ValueError(f"{op}: {name} is on {x.device}, but the other arguments are on {device}")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    exact: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """`out`, contiguous, is written where it is given."""
    x = x.contiguous()
    K, dtype = x.shape[-1], x.dtype
    O = weight.shape[0]
    out = x.new_empty((*x.shape[:-1], O), dtype=out_dtype or dtype) if out is None else out
    check("linear", "weight", weight, (None, K), dtype, x.device.type)
    if bias is not None:
        check("linear", "bias", bias, (O,), dtype, x.device.type)
    if out.dtype != dtype and out.dtype != torch.float32:
        raise ValueError(f"linear: out_dtype = {out_dtype}, accepted is {dtype} or torch.float32")
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    if triton(x):
        return family("linear").forward(x, weight, bias, out, exact)
    lib().linear(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.numel() // K if K else 0,
        O,
        K,
        DTYPES[dtype],
        DTYPES[out.dtype],
    )
    return out


def matmul(a: Tensor, b: Tensor, out: Tensor, sizes: tuple[int, int, int, int, int], add: bool) -> None:
    """out [I, C] (+)= A [I, R] @ b [R, C] in fp32; sizes are I, R, C and a's strides along I and R, one of which is 1."""
    lib().matmul(*pointers(a, b, out), *sizes, add)


def linear_backward(
    x: Tensor, weight: Tensor, grad: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(grad [M, O] @ weight [O, K], grad^T @ x [M, K]); what is not needed is empty.

    Not left to torch.mm: its OpenMP threads spin for milliseconds after each call and starve the workers of these kernels.
    """
    dtype = x.dtype
    if triton(x):
        grad = grad.to(dtype)
        return grad @ weight if need_x else x.new_empty(0), grad.t() @ x if need_weight else x.new_empty(0)
    x, weight, grad = x.float().contiguous(), weight.float().contiguous(), grad.float().contiguous()
    (M, O), K = grad.shape, x.shape[1]
    grad_x, grad_weight = x.new_empty((M, K) if need_x else 0), x.new_empty((O, K) if need_weight else 0)
    if need_x:
        matmul(grad, weight, grad_x, (M, O, K, O, 1), False)
    if need_weight:
        matmul(grad, x, grad_weight, (O, M, K, 1, O), False)
    return grad_x.to(dtype), grad_weight.to(dtype)


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, total); total is x itself without a residual."""
    x = x.contiguous()
    K = x.shape[-1]
    check("rms_norm", "weight", weight, (K,), x.dtype, x.device.type)
    weight = weight.contiguous()
    out, total = torch.empty_like(x), x
    if residual is not None:
        check("add_rms_norm", "residual", residual, tuple(x.shape), x.dtype, x.device.type)
        residual, total = residual.contiguous(), torch.empty_like(x)
    if triton(x):
        return family("rows").rms_norm(x, residual, weight, eps, out, total)
    lib().rms_norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        x.numel() // K if K else 0,
        K,
        eps,
        DTYPES[x.dtype],
    )
    return out, total


def rms_norm_backward(
    total: Tensor, weight: Tensor, eps: float, grad: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of the normed input, gradient of the weight). `grad_total` is added when the sum has another use."""
    K = total.shape[-1]
    rows = total.numel() // K
    total, weight, grad = total.contiguous(), weight.contiguous(), grad.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty_like(total)
    if triton(total):
        return family("rows").rms_norm_backward(total, weight, eps, grad, grad_total, grad_x)
    partial = torch.empty((-(-rows // 32), K), dtype=torch.float32)
    lib().rms_norm_backward(
        total.data_ptr(),
        weight.data_ptr(),
        grad.data_ptr(),
        0 if grad_total is None else grad_total.data_ptr(),
        grad_x.data_ptr(),
        partial.data_ptr(),
        rows,
        K,
        eps,
        DTYPES[total.dtype],
    )
    return grad_x, partial.sum(0).to(weight.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    check("silu_mul", "up", up, tuple(gate.shape), gate.dtype, gate.device.type)
    out = torch.empty_like(gate)
    if triton(gate):
        return family("rows").silu_mul(gate, up, None, out, out)[0]
    K = gate.shape[-1]
    lib().silu_mul(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel() // K if K else 0, K, DTYPES[gate.dtype]
    )
    return out


def silu_mul_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if triton(gate):
        return family("rows").silu_mul(gate, up, grad, grad_gate, grad_up)
    K = gate.shape[-1]
    lib().silu_mul_backward(
        gate.data_ptr(),
        up.data_ptr(),
        grad.data_ptr(),
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        gate.numel() // K if K else 0,
        K,
        DTYPES[gate.dtype],
    )
    return grad_gate, grad_up


def check_rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[int, int, int]:
    check("rope", "x", x, (None, None, None), None, x.device.type)
    T, H, D = x.shape
    if D % 2:
        raise ValueError(f"rope: the head dim is {D}, accepted is an even number")
    check("rope", "cos", cos, (None, D // 2), torch.float32, x.device.type)
    check("rope", "sin", sin, tuple(cos.shape), torch.float32, x.device.type)
    check("rope", "positions", positions, (T,), torch.int64, x.device.type)
    return T, H, D


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    T, H, D = check_rope(x, cos, sin, positions)
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    out = torch.empty_like(x)
    if triton(x):
        return family("rows").rotary(x, out, (), cos, sin, positions, sign, positions)
    bad = lib().rope(
        x.data_ptr(),
        out.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        positions.data_ptr(),
        T,
        H,
        D,
        cos.shape[0],
        sign,
        DTYPES[x.dtype],
    )
    if bad:
        raise ValueError(
            f"rope: positions[{bad - 1}] = {int(positions[bad - 1])}, accepted is 0 to {cos.shape[0] - 1}"
        )
    return out


def check_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> tuple[int, int, int]:
    check("write_kv", "k", k, (None, None, None), k_pages.dtype, k.device.type)
    T, Hk, D = k.shape
    check("write_kv", "v", v, (T, Hk, D), k.dtype, k.device.type)
    check("write_kv", "k_pages", k_pages, (None, None, Hk, D), k.dtype, k.device.type)
    check("write_kv", "v_pages", v_pages, tuple(k_pages.shape), k.dtype, k.device.type)
    check("write_kv", "slots", slots, (T,), torch.int64, k.device.type)
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("write_kv: k_pages and v_pages must be contiguous, they are written in place")
    return T, Hk, D


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    k, v = k.contiguous(), v.contiguous()
    T, Hk, D = check_kv(k, v, k_pages, v_pages, slots)
    slots = slots.contiguous()
    if triton(k):
        family("rows").rotary(k[:, :0], k, (k, v, k_pages, v_pages), k, k, slots, 1.0, slots)
        return
    n_slots = k_pages.shape[0] * k_pages.shape[1]
    bad = lib().write_kv(
        k.data_ptr(),
        v.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        slots.data_ptr(),
        T,
        n_slots,
        Hk * D * k.element_size(),
    )
    if bad:
        raise ValueError(
            f"write_kv: slots[{bad - 1}] = {int(slots[bad - 1])}, accepted is 0 to {n_slots - 1}"
        )


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> Tensor:
    """One launch on Triton; the contracts are those of rope and write_kv."""
    if triton(q):
        check_kv(k, v, k_pages, v_pages, slots)
        check_rope(q, cos, sin, positions)
        q, k, v, cos, sin, positions, slots = (x.contiguous() for x in (q, k, v, cos, sin, positions, slots))
        return family("rows").rotary(
            q, torch.empty_like(q), (k, v, k_pages, v_pages), cos, sin, positions, 1.0, slots
        )
    write_kv(rope(k, cos, sin, positions, 1.0), v, k_pages, v_pages, slots)
    return rope(q, cos, sin, positions, 1.0)
