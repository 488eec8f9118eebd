"""The gradients of packed attention on CUDA: kernels and launcher of kernels/attention.py. Tiles, and what
they are for a GPU, are those of the forward (attention.py).

A score's weight is computed anew from the forward's statistics; a program owns a tile of rows of q, or of
keys, and walks the other side in order, so gradients are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from duologue.kernels.gpu.attention import LOG2_E, sequence_of, tile
from duologue.kernels.gpu.launcher import capability, launch
from torch import Tensor


@triton.jit
def _weights(q, k, grad, v, stats, delta, row, visible, scale):
    """Of a tile: the weights p, and the gradient p (grad . v - grad . out) of the scores; [rows, keys]."""
    z = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    top = tl.load(stats + 2 * row)[:, None]
    inverse = tl.load(stats + 2 * row + 1)[:, None]
    p = tl.where(visible, tl.exp2(z - top) * inverse, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision="tf32x3")
    return p, p * (dp - tl.load(delta + row)[:, None])


@triton.jit(do_not_specialize=["S"])
def grad_query_kernel(
    q,
    k,
    v,
    grad,
    stats,
    delta,
    cu_seqlens,
    grad_q,
    scale,
    S,
    Hq,
    Hk,
    D,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    R = Hq // Hk
    g = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    _, begin, n, x = sequence_of(cu_seqlens, S, R, ROWS)
    if tl.min(x, 0) < n * R:
        last = n * R - 1  # a row past the end computes what is not stored
        row = (begin + tl.minimum(x, last) // R) * Hq + g * R + x % R
        at = row[:, None] * D + d[None, :]
        width = (d < D)[None, :]
        rows = tl.load(q + at, width, 0.0)
        grads = tl.load(grad + at, width, 0.0)
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, tl.minimum(tl.max(x, 0), last) // R + 1, KEYS):
            key = first + tl.arange(0, KEYS)
            of_key = ((begin + key) * Hk + g)[:, None] * D + d[None, :]
            real = (key < n)[:, None] & width
            keys = tl.load(k + of_key, real, 0.0)
            values = tl.load(v + of_key, real, 0.0)
            visible = key[None, :] <= (x // R)[:, None]
            ds = _weights(rows, keys, grads, values, stats, delta, row, visible, scale * LOG2_E)[1]
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="tf32x3")
        tl.store(grad_q + at, (acc * scale).to(grad_q.dtype.element_ty), (x <= last)[:, None] & width)


@triton.jit(do_not_specialize=["S"])
def grad_key_kernel(
    q,
    k,
    v,
    grad,
    stats,
    delta,
    cu_seqlens,
    grad_k,
    grad_v,
    scale,
    S,
    Hq,
    Hk,
    D,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of keys, g) owns its keys' gradients and walks the rows that see them in order."""
    R = Hq // Hk
    g = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    _, begin, n, key = sequence_of(cu_seqlens, S, 1, KEYS)
    first = tl.min(key, 0)
    if first < n:
        of_key = ((begin + key) * Hk + g)[:, None] * D + d[None, :]
        width = (d < D)[None, :]
        real = (key < n)[:, None] & width
        keys = tl.load(k + of_key, real, 0.0)
        values = tl.load(v + of_key, real, 0.0)
        grad_keys = tl.zeros((KEYS, BLOCK), tl.float32)
        grad_values = tl.zeros((KEYS, BLOCK), tl.float32)
        for start in range(first * R, n * R, ROWS):
            x = start + tl.arange(0, ROWS)
            row = (begin + tl.minimum(x, n * R - 1) // R) * Hq + g * R + x % R
            at = row[:, None] * D + d[None, :]
            visible = (key[None, :] <= (x // R)[:, None]) & (x < n * R)[:, None]
            rows = tl.load(q + at, width, 0.0)
            grads = tl.load(grad + at, width, 0.0)
            p, ds = _weights(rows, keys, grads, values, stats, delta, row, visible, scale * LOG2_E)
            grad_values = tl.dot(tl.trans(p).to(grads.dtype), grads, grad_values, input_precision="tf32x3")
            grad_keys = tl.dot(tl.trans(ds).to(rows.dtype), rows, grad_keys, input_precision="tf32x3")
        tl.store(grad_k + of_key, (grad_keys * scale).to(grad_k.dtype.element_ty), real)
        tl.store(grad_v + of_key, grad_values.to(grad_v.dtype.element_ty), real)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    out: Tensor,
    stats: Tensor,
    grad: Tensor,
    *grads: Tensor,
) -> tuple[Tensor, ...]:
    """Fills and returns grads, those of q, k and v."""
    T, Hq, D = q.shape
    Hk = k.shape[1]
    S = len(cu_seqlens) - 1
    narrow, chip = q.element_size() == 2, capability(q)
    inputs = (q, k, v, grad, stats, (grad.float() * out.float()).sum(-1), cu_seqlens)
    sizes = (scale, S, Hq, Hk, D)
    if T:
        tiles = tile(D, narrow, "grad_query", chip)
        of_rows = (triton.cdiv(T * Hq // Hk, tiles["ROWS"]) + S, Hk)
        launch(grad_query_kernel, of_rows, *inputs, grads[0], *sizes, **tiles)
        tiles = tile(D, narrow, "grad_key", chip)
        of_keys = (triton.cdiv(T, tiles["KEYS"]) + S, Hk)
        launch(grad_key_kernel, of_keys, *inputs, *grads[1:], *sizes, **tiles)
    return grads
