"""RMS norm, the gate, rotary embedding and KV writes on CUDA: kernels and launchers. All are bound by memory.

A row is summed in one program by one layout, which depends on its length alone: so its bits depend on that
row alone. Tensors are contiguous and checked by the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEPS, GATE, HEADS = (
    8,
    1024,
    8,
)  # row tiles that share a partial sum; elements of a program of silu_mul; heads of one of rotary


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
    n, k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at, real = n[:, None] * K + k[None, :], (n < N)[:, None] & (k < K)[None, :]
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
    w, sums = tl.load(weight + k, k < K, 0.0).to(tl.float32), tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        n = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at, real = n[:, None] * K + k[None, :], (n < N)[:, None] & (k < K)[None, :]
        x, g = tl.load(total + at, real, 0.0).to(tl.float32), tl.load(grad + at, real, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
        normed, gw = x * scale, g * w[None, :]
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
    g, u = tl.load(gate + at, at < size, 0.0).to(tl.float32), tl.load(up + at, at < size, 0.0).to(tl.float32)
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
    """Program (t, b): a block of heads of token t, of q, then k, then v. q and (if ROTATE) k are turned; q
    goes to the same row of q_out, k and v go to the token's slot of k_out and v_out. A position outside of
    the tables gives NaN."""
    t, b, d, half = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, HALF), tl.cdiv(D, 2)
    of_k, of_v = tl.cdiv(Hq, HEADS), tl.cdiv(Hq, HEADS) + tl.cdiv(Hk, HEADS)
    x, to = q, q_out
    if b >= of_k:
        x, to = k, k_out
    if b >= of_v:
        x, to = v, v_out
    row, H = tl.load(slots + t, b >= of_k, t), tl.where(b >= of_k, Hk, Hq)
    h = (b - tl.where(b >= of_v, of_v, tl.where(b >= of_k, of_k, 0))) * HEADS + tl.arange(0, HEADS)
    low, high = (h < H)[:, None] & (d < half)[None, :], (h < H)[:, None] & (d + half < D)[None, :]
    at, there = (t * H + h)[:, None] * D + d[None, :], (row * H + h)[:, None] * D + d[None, :]
    one, two = tl.load(x + at, low, 0.0), tl.load(x + at + half, high, 0.0)
    if (b < of_k) | ((b < of_v) & ROTATE):
        place = tl.load(positions + t)
        known = (d < half) & (place >= 0) & (place < max_position)
        c = tl.load(cos + place * half + d, known, float("nan"))[None, :]
        s = sign * tl.load(sin + place * half + d, known, float("nan"))[None, :]
        a, e = one.to(tl.float32), two.to(tl.float32)
        one, two = (a * c - e * s).to(q.dtype.element_ty), (e * c + a * s).to(q.dtype.element_ty)
    tl.store(to + there, one, low)
    tl.store(to + there + half, two, high)


def norm_tile(K: int) -> dict[str, int]:
    block = triton.next_power_of_2(K)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4 if block < 4096 else 8}


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    K, tile, there = x.shape[-1], norm_tile(x.shape[-1]), residual is not None
    if N := x.numel() // max(K, 1):
        grid = (triton.cdiv(N, tile["ROWS"]),)
        rms_norm_kernel[grid](
            x, residual if there else x, weight, out, total, N, K, eps, HAS_RESIDUAL=there, **tile
        )
    return out, total


def rms_norm_backward(
    total: Tensor, weight: Tensor, eps: float, grad: Tensor, grad_total: Tensor | None, grad_x: Tensor
) -> tuple[Tensor, Tensor]:
    K, tile, there = total.shape[-1], norm_tile(total.shape[-1]), grad_total is not None
    N = total.numel() // max(K, 1)
    partial = total.new_empty((triton.cdiv(N, tile["ROWS"] * STEPS), K), dtype=torch.float32)
    if N:
        inputs = (total, weight, grad, grad_total if there else grad, grad_x, partial, N, K, eps)
        rms_norm_backward_kernel[(len(partial),)](*inputs, HAS_TOTAL=there, STEPS=STEPS, **tile)
    return grad_x, partial.sum(0).to(weight.dtype)


def silu_mul(
    gate: Tensor, up: Tensor, grad: Tensor | None, out: Tensor, grad_up: Tensor
) -> tuple[Tensor, Tensor]:
    backward, grid = grad is not None, (triton.cdiv(gate.numel(), GATE),)
    if grid[0]:
        tensors = (gate, up, grad if backward else gate, out, grad_up)
        silu_mul_kernel[grid](*tensors, gate.numel(), BACKWARD=backward, BLOCK=GATE, num_warps=4)
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
    """q [T, Hq, D] turned by its positions [T] into q_out; `kv`, where not empty, is k and v [T, Hk, D] and
    their pages: k is turned too, unless Hq = 0, and both go to the slots [T] of the pages."""
    (T, Hq, D), (k, v, k_pages, v_pages) = q.shape, kv or (q, q, q_out, q_out)
    Hk = k.shape[1] if kv else 0
    if T:
        rotary_kernel[(T, triton.cdiv(Hq, HEADS) + 2 * triton.cdiv(Hk, HEADS))](
            q,
            q_out,
            k,
            k_pages,
            v,
            v_pages,
            cos,
            sin,
            positions,
            slots,
            Hq,
            Hk,
            D,
            len(cos),
            sign,
            ROTATE=Hq > 0,
            HALF=triton.next_power_of_2(triton.cdiv(D, 2)),
            HEADS=HEADS,
            num_warps=4,
        )
    return q_out
