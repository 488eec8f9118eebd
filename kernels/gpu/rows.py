"""RMS norm, the gate, rotary embedding and KV writes on CUDA: kernels and launchers. All are bound by memory.

A row is summed in one program by one layout, which depends on its length alone: so its bits depend on that
row alone. Tensors are contiguous and checked by the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEPS = 8  # row tiles that share a partial sum
GATE = 1024  # elements of a program of silu_mul
HEADS = 8  # of a program of rotary


@triton.jit(do_not_specialize=["N"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    N,
    K,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    at = n[:, None] * K + k[None, :]
    real = (n < N)[:, None] & (k < K)[None, :]
    z = tl.load(x + at, real, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        z = (z + tl.load(residual + at, real, 0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + at, z, real)
        z = z.to(tl.float32)
    scale = tl.rsqrt(tl.sum(z * z, 1) / K + eps)
    normed = (z * scale[:, None]).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + k, k < K, 0.0).to(tl.float32)
    tl.store(out + at, (normed * w[None, :]).to(out.dtype.element_ty), real)


@triton.jit(do_not_specialize=["N"])
def rms_norm_backward_kernel(
    total,
    weight,
    grad,
    grad_total,
    grad_x,
    partial,
    N,
    K,
    eps,
    HAS_TOTAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Program p: grad_x of its rows, and partial [p, K], their sum of grad * normed for the weight."""
    k = tl.arange(0, BLOCK)
    w = tl.load(weight + k, k < K, 0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        n = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = n[:, None] * K + k[None, :]
        real = (n < N)[:, None] & (k < K)[None, :]
        x = tl.load(total + at, real, 0.0).to(tl.float32)
        g = tl.load(grad + at, real, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
        normed = x * scale
        gw = g * w[None, :]
        sums += tl.sum(g * normed.to(grad_x.dtype.element_ty).to(tl.float32), 0)
        gx = scale * (gw - normed * (tl.sum(gw * normed, 1) / K)[:, None])
        if HAS_TOTAL:
            gx += tl.load(grad_total + at, real, 0.0).to(tl.float32)
        tl.store(grad_x + at, gx.to(grad_x.dtype.element_ty), real)
    tl.store(partial + tl.program_id(0).to(tl.int64) * K + k, sums, k < K)


@triton.jit
def silu_mul_kernel(gate, up, grad, out, grad_up, size, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """out = silu(gate) * up; or, backward, the gradients of gate (in out) and of up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < size, 0.0).to(tl.float32)
    u = tl.load(up + at, at < size, 0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    y = g * s * u
    if BACKWARD:
        d = tl.load(grad + at, at < size, 0.0).to(tl.float32)
        tl.store(grad_up + at, (d * g * s).to(grad_up.dtype.element_ty), at < size)
        y = d * u * s * (1.0 + g * (1.0 - s))
    tl.store(out + at, y.to(out.dtype.element_ty), at < size)


@triton.jit
def rotary_kernel(
    q,
    q_out,
    k,
    k_out,
    v,
    v_out,
    cos,
    sin,
    positions,
    slots,
    Hq,
    Hk,
    D,
    max_position,
    sign,
    ROTATE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Program (t, b): a block of heads of token t, of q, then k, then v. q and (if ROTATE) k are rotated; q
    goes to the same row of q_out, k and v go to the token's slot of k_out and v_out. A position outside of
    the tables gives NaN."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1)
    d = tl.arange(0, HALF)
    half = tl.cdiv(D, 2)
    of_k = tl.cdiv(Hq, HEADS)
    of_v = of_k + tl.cdiv(Hk, HEADS)
    x, out = q, q_out
    if b >= of_k:
        x, out = k, k_out
    if b >= of_v:
        x, out = v, v_out
    row = tl.load(slots + t, b >= of_k, t)
    H = tl.where(b >= of_k, Hk, Hq)
    h = (b - tl.where(b >= of_v, of_v, tl.where(b >= of_k, of_k, 0))) * HEADS + tl.arange(0, HEADS)
    real = (h < H)[:, None] & (d < half)[None, :]
    real_high = (h < H)[:, None] & (d + half < D)[None, :]
    at = (t * H + h)[:, None] * D + d[None, :]
    to = (row * H + h)[:, None] * D + d[None, :]
    low = tl.load(x + at, real, 0.0)
    high = tl.load(x + at + half, real_high, 0.0)
    if (b < of_k) | ((b < of_v) & ROTATE):
        position = tl.load(positions + t)
        known = (d < half) & (position >= 0) & (position < max_position)
        c = tl.load(cos + position * half + d, known, float("nan"))[None, :]
        s = sign * tl.load(sin + position * half + d, known, float("nan"))[None, :]
        x1 = low.to(tl.float32)
        x2 = high.to(tl.float32)
        low = (x1 * c - x2 * s).to(q.dtype.element_ty)
        high = (x2 * c + x1 * s).to(q.dtype.element_ty)
    tl.store(out + to, low, real)
    tl.store(out + to + half, high, real_high)


def norm_tile(K: int) -> dict[str, int]:
    block = triton.next_power_of_2(K)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4 if block < 4096 else 8}


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    K = x.shape[-1]
    tile = norm_tile(K)
    if N := x.numel() // max(K, 1):
        tensors = (x, x if residual is None else residual, weight, out, total)
        grid = (triton.cdiv(N, tile["ROWS"]),)
        rms_norm_kernel[grid](*tensors, N, K, eps, HAS_RESIDUAL=residual is not None, **tile)
    return out, total


def rms_norm_backward(
    total: Tensor, weight: Tensor, eps: float, grad: Tensor, grad_total: Tensor | None, grad_x: Tensor
) -> tuple[Tensor, Tensor]:
    K = total.shape[-1]
    N = total.numel() // max(K, 1)
    tile = norm_tile(K)
    partial = total.new_empty((triton.cdiv(N, tile["ROWS"] * STEPS), K), dtype=torch.float32)
    if N:
        tensors = (total, weight, grad, grad if grad_total is None else grad_total, grad_x, partial)
        flags = {"HAS_TOTAL": grad_total is not None, "STEPS": STEPS}
        rms_norm_backward_kernel[(len(partial),)](*tensors, N, K, eps, **flags, **tile)
    return grad_x, partial.sum(0).to(weight.dtype)


def silu_mul(
    gate: Tensor, up: Tensor, grad: Tensor | None, out: Tensor, grad_up: Tensor
) -> tuple[Tensor, Tensor]:
    if size := gate.numel():
        tensors = (gate, up, gate if grad is None else grad, out, grad_up)
        grid = (triton.cdiv(size, GATE),)
        silu_mul_kernel[grid](*tensors, size, BACKWARD=grad is not None, BLOCK=GATE, num_warps=4)
    return out, grad_up


def rotary(
    q: Tensor,
    q_out: Tensor,
    kv: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    sign: float,
    slots: Tensor,
) -> Tensor:
    """q [T, Hq, D] rotated by its positions [T] into q_out; `kv`, where not empty, is k and v [T, Hk, D] and
    their pages: k is rotated too, unless Hq = 0, and both go to the slots [T] of the pages."""
    T, Hq, D = q.shape
    k, v, k_pages, v_pages = kv or (q, q, q_out, q_out)
    Hk = k.shape[1] if kv else 0
    if T:
        tensors = (q, q_out, k, k_pages, v, v_pages, cos, sin, positions, slots)
        flags = {"ROTATE": Hq > 0, "HALF": triton.next_power_of_2(triton.cdiv(D, 2)), "HEADS": HEADS}
        grid = (T, triton.cdiv(Hq, HEADS) + 2 * triton.cdiv(Hk, HEADS))
        rotary_kernel[grid](*tensors, Hq, Hk, D, len(cos), sign, **flags, num_warps=4)
    return q_out
