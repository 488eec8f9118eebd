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
    tl.store(out + at, (low * c - high * s).to(out.dtype.element_ty), real)
    high = tl.fma(high, c, low * s)  # else the compiler chooses which product it fuses, and with it the bits
    tl.store(out + at + half, high.to(out.dtype.element_ty), real)


@triton.jit
def write_kv_kernel(k, v, k_pages, v_pages, slots, size, BLOCK: tl.constexpr):
    """Program (t, b): a block of the `size` = Hk * D elements of token t, to the token's slot."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(k_pages + slot * size + i, tl.load(k + t * size + i, i < size), i < size)
    tl.store(v_pages + slot * size + i, tl.load(v + t * size + i, i < size), i < size)


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
        launch(rms_norm_kernel, grid, *tensors, N, K, eps, HAS_RESIDUAL=residual is not None, **tile)
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
        launch(silu_mul_kernel, grid, *tensors, size, BACKWARD=grad is not None, BLOCK=GATE, num_warps=4)
    return out, grad_up


def rotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float) -> Tensor:
    """x [T, H, D] rotated by its positions [T] into out."""
    T, H, D = x.shape
    if T * H:
        tile = {"HALF": triton.next_power_of_2(triton.cdiv(D, 2)), "HEADS": HEADS}
        grid = (T, triton.cdiv(H, HEADS))
        launch(rotate_kernel, grid, x, out, cos, sin, positions, H, D, len(cos), sign, **tile, num_warps=4)
    return out


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """k and v [T, Hk, D] to the slots [T] of their pages."""
    if k.numel():
        size = k[0].numel()
        grid = (len(k), triton.cdiv(size, KV))
        launch(write_kv_kernel, grid, k, v, k_pages, v_pages, slots, size, BLOCK=KV, num_warps=4)
