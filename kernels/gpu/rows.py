"""RMS norm, the gate, rotary embedding and KV writes on CUDA: kernels and launchers. All are bound by memory.

A row is summed in one program by one layout, which depends on its length alone: so its bits depend on that
row alone. Tensors are contiguous and checked by the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from duologue.kernels.gpu.launcher import launch
from torch import Tensor

STEPS = 8  # row tiles that share a partial sum
GATE = 1024  # elements of a program of silu_mul
HEADS = 8  # of a program of rotate
KV = 1024  # elements of a program of write_kv
FIXED = {"enable_fp_fusion": False}  # of kernels that must round alike: products are fused only by tl.fma


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
def _turn(low, high, c, s):
    """By an angle of this cosine and sine. Else the compiler chooses which product it fuses, and with it the
    bits."""
    return tl.fma(-high, s, low * c), tl.fma(high, c, low * s)


@triton.jit
def rotate_kernel(
    x, out, cos, sin, positions, H, D, max_position, sign, HALF: tl.constexpr, HEADS: tl.constexpr
):
    """Program (t, b): a block of heads of token t, rotated by its position; NaN when that is out of range."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF)
    half = D // 2
    real = (h < H)[:, None] & (d < half)[None, :]
    at = (t * H + h)[:, None] * D + d[None, :]
    position = tl.load(positions + t)
    known = (d < half) & (position >= 0) & (position < max_position)
    c = tl.load(cos + position * half + d, known, float("nan"))[None, :]
    s = sign * tl.load(sin + position * half + d, known, float("nan"))[None, :]
    low = tl.load(x + at, real, 0.0).to(tl.float32)
    high = tl.load(x + at + half, real, 0.0).to(tl.float32)
    low, high = _turn(low, high, c, s)
    tl.store(out + at, low.to(out.dtype.element_ty), real)
    tl.store(out + at + half, high.to(out.dtype.element_ty), real)


@triton.jit
def write_kv_kernel(k, v, k_pages, v_pages, slots, size, BLOCK: tl.constexpr):
    """Program (t, b): a block of the `size` = Hk * D elements of token t, to the token's slot."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(k_pages + slot * size + i, tl.load(k + t * size + i, i < size), i < size)
    tl.store(v_pages + slot * size + i, tl.load(v + t * size + i, i < size), i < size)


@triton.jit
def _half(x, weight, at, d, half, real, scale, HAS_NORM: tl.constexpr):
    """Half of each head in fp32, normed and rounded as `rms_norm_kernel` stores it."""
    z = tl.load(x + at, real, 0.0)
    if HAS_NORM:
        normed = (z.to(tl.float32) * scale[:, None]).to(z.dtype).to(tl.float32)
        w = tl.load(weight + d, d < half, 0.0).to(tl.float32)
        z = (normed * w[None, :]).to(z.dtype)
    return z.to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def rotate_write_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos,
    sin,
    positions,
    slots,
    out,
    k_pages,
    v_pages,
    T,
    Hq,
    Hk,
    D,
    max_position,
    eps,
    HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):
    """`rms_norm_kernel` on the heads of q and k, `rotate_kernel`, and `write_kv_kernel`: q [T, Hq, D] to out,
    k and v [T, Hk, D] to the tokens' slots. A program has ROWS heads of q or of k, and then those of v.

    A row is summed by the layout of `rms_norm_kernel`, so with its bits; its halves are then read again.
    """
    blocks = tl.cdiv(T * Hq, ROWS)
    block = tl.program_id(0)
    is_key = block >= blocks
    x = q
    weight = q_weight
    to = out
    H = Hq
    if is_key:
        x = k
        weight = k_weight
        to = k_pages
        H = Hk
        block -= blocks
    n = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t = n // H
    mine = t < T
    wide = tl.arange(0, BLOCK)
    real = mine[:, None] & (wide < D)[None, :]
    scale = tl.zeros((ROWS,), tl.float32)
    if HAS_NORM:
        z = tl.load(x + n[:, None] * D + wide[None, :], real, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(z * z, 1) / D + eps)
    half = D // 2
    d = tl.arange(0, HALF)
    position = tl.load(positions + t, mine, 0)
    known = (d < half)[None, :] & ((position >= 0) & (position < max_position))[:, None]
    c = tl.load(cos + position[:, None] * half + d[None, :], known, float("nan"))
    s = tl.load(sin + position[:, None] * half + d[None, :], known, float("nan"))
    at = n[:, None] * D + d[None, :]
    there = mine[:, None] & (d < half)[None, :]
    low = _half(x, weight, at, d, half, there, scale, HAS_NORM)
    high = _half(x, weight + half, at + half, d, half, there, scale, HAS_NORM)
    low, high = _turn(low, high, c, s)
    row = n
    if is_key:
        row = tl.load(slots + t, mine, 0) * H + n % H
        values = tl.load(v + n[:, None] * D + wide[None, :], real, 0.0)
        tl.store(v_pages + row[:, None] * D + wide[None, :], values, real)
    to = to + row[:, None] * D + d[None, :]
    tl.store(to, low.to(q.dtype.element_ty), there)
    tl.store(to + half, high.to(q.dtype.element_ty), there)


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
        launch(rms_norm_kernel, grid, *tensors, N, K, eps, HAS_RESIDUAL=residual is not None, **FIXED, **tile)
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
        launch(rms_norm_backward_kernel, (len(partial),), *tensors, N, K, eps, **flags, **tile)
    return grad_x, partial.sum(0).to(weight.dtype)


def silu_mul(
    gate: Tensor, up: Tensor, grad: Tensor | None, out: Tensor, grad_up: Tensor
) -> tuple[Tensor, Tensor]:
    if size := gate.numel():
        tensors = (gate, up, gate if grad is None else grad, out, grad_up)
        grid = (triton.cdiv(size, GATE),)
        launch(
            silu_mul_kernel, grid, *tensors, size, BACKWARD=grad is not None, BLOCK=GATE, num_warps=4, **FIXED
        )
    return out, grad_up


def rotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float) -> Tensor:
    """x [T, H, D] rotated by its positions [T] into out."""
    T, H, D = x.shape
    if T * H:
        tile = {"HALF": triton.next_power_of_2(triton.cdiv(D, 2)), "HEADS": HEADS}
        grid = (T, triton.cdiv(H, HEADS))
        launch(
            rotate_kernel,
            grid,
            x,
            out,
            cos,
            sin,
            positions,
            H,
            D,
            len(cos),
            sign,
            **tile,
            num_warps=4,
            **FIXED,
        )
    return out


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """k and v [T, Hk, D] to the slots [T] of their pages."""
    if k.numel():
        size = k[0].numel()
        grid = (len(k), triton.cdiv(size, KV))
        launch(write_kv_kernel, grid, k, v, k_pages, v_pages, slots, size, BLOCK=KV, num_warps=4)


def rotate_write_tile(D: int) -> dict[str, int]:
    """Rows as in `norm_tile`: their number decides the order of a sum."""
    return {**norm_tile(D), "HALF": triton.next_power_of_2(triton.cdiv(D, 2))}


def rotate_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rotary: tuple[Tensor, Tensor, Tensor],
    pages: tuple[Tensor, Tensor],
    slots: Tensor,
    out: Tensor,
) -> Tensor:
    """Fills out [T, Hq, D] and the slots of the pages; `rotary` are cos, sin and positions."""
    T, Hq, D = q.shape
    Hk = k.shape[1]
    if T:
        tile = rotate_write_tile(D)
        grid = (triton.cdiv(T * Hq, tile["ROWS"]) + triton.cdiv(T * Hk, tile["ROWS"]),)
        tensors = (q, k, v, *(norms or (q, k)), *rotary, slots, out, *pages)
        sizes = (T, Hq, Hk, D, len(rotary[0]), eps)
        launch(rotate_write_kernel, grid, *tensors, *sizes, HAS_NORM=norms is not None, **FIXED, **tile)
    return out
