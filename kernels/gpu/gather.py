"""Sums of the rows of one number on CUDA, in order: the kernels of kernels/gather.py, and their launchers."""

from __future__ import annotations

import triton
import triton.language as tl
from duologue.kernels.gpu.launcher import launch
from torch import Tensor


@triton.jit
def sum_rows_kernel(x, places, starts, out, K, BLOCK: tl.constexpr):
    """Program (u, c): the c-th block of out[u], from rows places[starts[u]] and on of x [T, K], in order."""
    u = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(starts + u), tl.load(starts + u + 1)):
        total += tl.load(x + tl.load(places + i) * K + k, k < K, 0.0).to(tl.float32)
    tl.store(out + u * K + k, total.to(out.dtype.element_ty), k < K)


@triton.jit
def add_rows_kernel(x, ranked, places, total, T, K, BLOCK: tl.constexpr):
    """Program (i, c): the c-th block of total[ranked[i]] += the rows x[places[i]] and on of that number,
    where i is the first of it. `ranked` [T] rises, `places` [T] are those of x [T, K].
    """
    i = tl.program_id(0)
    number = tl.load(ranked + i)
    if tl.load(ranked + i - 1, i > 0, -1) != number:
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        added = tl.zeros((BLOCK,), tl.float32)
        same = number
        while same == number:
            added += tl.load(x + tl.load(places + i) * K + k, k < K, 0.0).to(tl.float32)
            i += 1
            same = tl.load(ranked + i, i < T, -1)
        at = total + number * K + k
        tl.store(at, tl.load(at, k < K, 0.0) + added, k < K)


def block(K: int) -> int:
    """Elements of a program, of rows of length K."""
    return min(1024, int(triton.next_power_of_2(K)))


def sum_rows(x: Tensor, places: Tensor, starts: Tensor, out: Tensor) -> Tensor:
    """Fills out [U, ...] from x [T, ...]; both contiguous."""
    if out.numel():
        K = out[0].numel()
        grid = (len(out), triton.cdiv(K, block(K)))
        launch(sum_rows_kernel, grid, x, places, starts, out, K, BLOCK=block(K), num_warps=4)
    return out


def add_rows(total: Tensor, ranked: Tensor, places: Tensor, x: Tensor) -> None:
    """total [V, H] fp32 += x [T, H], row places[i] to row ranked[i]; both contiguous."""
    if x.numel():
        T, H = x.shape
        grid = (T, triton.cdiv(H, block(H)))
        launch(add_rows_kernel, grid, x, ranked, places, total, T, H, BLOCK=block(H), num_warps=4)
