"""Log-prob, entropy and sampling on CUDA: kernels and launchers of kernels/softmax.py.

A program has a row to itself and reads it in blocks, each lane with a running softmax of its own; one routine takes a row's
statistics for all, so what the sampler reports is what training computes. The noise has the words and uniforms of reference.py.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCH: dict[str, Any] = {
    "BLOCK": 2048,
    "num_warps": 8,
    "enable_fp_fusion": False,
}  # fusing differs by kernel
LOWEST, NONE = tl.constexpr(-1e30), tl.constexpr(-float("inf"))


@triton.jit
def _exponent(x, top, scale):
    """(x - top) * scale, never below -1e30, so that what is excluded (-inf) counts as nothing."""
    return tl.maximum((x - top) * scale, LOWEST)


@triton.jit
def _logits(row, v, V, cut):
    x = tl.load(row + v, v < V, NONE).to(tl.float32)
    return tl.where(x > cut, x, NONE)


@triton.jit
def _row_stats(row, V, inverse, cut, BLOCK: tl.constexpr):
    """Of the logits above `cut`: the largest, log sum exp((logit - largest) * inverse), and the entropy."""
    scale, top = inverse * 1.44269504, tl.full((BLOCK,), -3e38, tl.float32)
    total, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = _logits(row, start + tl.arange(0, BLOCK), V, cut)
        most = tl.maximum(top, x)
        fall, t = _exponent(top, most, scale), _exponent(x, most, scale)
        shrink, p = tl.exp2(fall), tl.exp2(t)
        weighted, total, top = (weighted + total * fall) * shrink + p * t, total * shrink + p, most
    most = tl.max(top, 0)
    fall = _exponent(top, most, scale)
    weighted, total = tl.sum((weighted + total * fall) * tl.exp2(fall), 0), tl.sum(total * tl.exp2(fall), 0)
    log_sum = tl.log(total)
    return most, log_sum, log_sum - weighted / total * 0.693147181


@triton.jit
def logprob_kernel(
    logits,
    targets,
    temperatures,
    temperature,
    logprob,
    entropy,
    stats,
    V,
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    target, inverse = tl.load(targets + n), 1.0 / (tl.load(temperatures + n) if BY_ROW else temperature)
    top, log_sum, spread = _row_stats(logits + n * V, V, inverse, NONE, BLOCK)
    x = tl.load(logits + n * V + target, (target >= 0) & (target < V), float("nan")).to(tl.float32)
    tl.store(logprob + n, (x - top) * inverse - log_sum)
    tl.store(entropy + n, spread)
    tl.store(stats + 2 * n, top)
    tl.store(stats + 2 * n + 1, log_sum)


@triton.jit
def logprob_backward_kernel(
    logits,
    targets,
    temperatures,
    temperature,
    entropy,
    stats,
    grad_logprob,
    grad_entropy,
    source,
    grad,
    V,
    BY_ROW: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d logprob / dz_v = [v = target] - p_v; d entropy / dz_v = -p_v (log p_v + entropy); z = logits / temperature. May be in place.
    With MOVES a row of `grad` is that of row source[row], and left alone where that is negative."""
    row, v = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(source + row) if MOVES else row
    if n < 0:
        return
    inverse = 1.0 / (tl.load(temperatures + n) if BY_ROW else temperature)
    g, h = tl.load(grad_logprob + n) * inverse, tl.load(grad_entropy + n) * inverse
    x = _logits(logits + n * V, v, V, NONE)
    logp = _exponent(x, tl.load(stats + 2 * n), inverse) - tl.load(stats + 2 * n + 1)
    dz = tl.where(v == tl.load(targets + n), g, 0.0) - tl.exp(logp) * (g + h * (logp + tl.load(entropy + n)))
    tl.store(grad + row * V + v, dz.to(grad.dtype.element_ty), v < V)


@triton.jit
def _order(x):
    """Integers in the order of the floats; of such an integer's bits, the float."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _above(row, V, cut, top, scale, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """(weight, number) of the logits above `cut`; the weight is their number, or the sum of 2^((logit - top) * scale)."""
    weight, count = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        x = _logits(row, start + tl.arange(0, BLOCK), V, cut)
        count += (x > NONE).to(tl.int32)
        weight += tl.exp2(_exponent(x, top, scale)) if WEIGHTED else (x > NONE).to(tl.float32)
    return tl.sum(weight, 0), tl.sum(count, 0)


@triton.jit
def _cut_at(row, V, cut, top, scale, share, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The cut, at least `cut`, below the last logit that has less than the target above it: `share`, or if WEIGHTED this share of
    what is above `cut`. Bisects the floats in between until one logit is left."""
    weight, most = _above(row, V, cut, top, scale, WEIGHTED, BLOCK)
    target = share * weight if WEIGHTED else share
    low, high, least = _order(cut).to(tl.int64), _order(top).to(tl.int64), 0
    while (high - low > 1) & (most - least > 1):
        mid = low + (high - low) // 2
        weight, count = _above(
            row, V, _order(mid.to(tl.int32)).to(tl.float32, bitcast=True), top, scale, WEIGHTED, BLOCK
        )
        stays = weight < target
        low, most = tl.where(stays, low, mid), tl.where(stays, most, count)
        high, least = tl.where(stays, mid, high), tl.where(stays, count, least)
    return _order(low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _noise(seed, position, start, BLOCK: tl.constexpr):
    """Gumbel noise of the tokens from `start` (a multiple of 4) on."""
    block = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    low, high = (position & 4294967295).to(tl.uint32), ((position >> 32) & 4294967295).to(tl.uint32)
    a, b, c, d = tl.philox(seed, block, block * 0, block * 0 + low, block * 0 + high)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    w = 1.0 - u  # -log1p(-u) by Kahan's correction of log(w) for the rounding of w
    return -tl.log(tl.where(w == 1.0, u, u * (tl.log(w) / (w - 1.0))))


@triton.jit
def sample_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    token,
    logprob,
    entropy,
    cuts,
    V,
    BLOCK: tl.constexpr,
):
    """Also stores the cut: the tokens kept are those with a logit above it, and log-prob and entropy are over these."""
    n = tl.program_id(0).to(tl.int64)
    row, heat = logits + n * V, tl.load(temperature + n)
    inverse, k, p, m = (
        1.0 / tl.where(heat == 0, 1.0, heat),
        tl.load(top_k + n),
        tl.load(top_p + n),
        tl.load(min_p + n),
    )
    top, log_sum, spread = _row_stats(row, V, inverse, NONE, BLOCK)
    cut, scale = top * 0 + NONE, inverse * 1.44269504
    if (heat > 0) & (k > 0) & (k < V):
        cut = _cut_at(row, V, cut, top, scale, k.to(tl.float32), False, BLOCK)
    if (heat > 0) & (p < 1):
        cut = _cut_at(row, V, cut, top, scale, p, True, BLOCK)
    if (heat > 0) & (m > 0):
        cut = tl.maximum(cut, _order(_order(top + tl.log(m) / inverse) - 1).to(tl.float32, bitcast=True))
    if cut > NONE:
        top, log_sum, spread = _row_stats(row, V, inverse, cut, BLOCK)
    best, first = tl.full((BLOCK,), NONE, tl.float32), tl.zeros((BLOCK,), tl.int32)
    key, counter = tl.load(seed + n), tl.load(position + n)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        score = (_logits(row, v, V, cut) - top) * inverse
        if heat > 0:
            score += _noise(key, counter, start, BLOCK)
        first, best = tl.where(score > best, v, first), tl.maximum(score, best)
    chosen = tl.min(tl.where(best == tl.max(best, 0), first, V - 1), 0)
    tl.store(token + n, chosen.to(tl.int64))
    tl.store(logprob + n, (tl.load(row + chosen).to(tl.float32) - top) * inverse - log_sum)
    tl.store(entropy + n, spread)
    tl.store(cuts + n, cut)


@triton.jit
def keep_kernel(logits, cuts, kept, sizes, V, most, BLOCK: tl.constexpr):
    """The ids of a row above its cut, ascending, as far as there is room; their number, 0 when nothing was cut off."""
    n = tl.program_id(0).to(tl.int64)
    cut, count = tl.load(cuts + n), 0
    if cut > NONE:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            above = (_logits(logits + n * V, v, V, cut) > NONE).to(tl.int32)
            place = count + tl.cumsum(above, 0) - above
            tl.store(kept + n * most + place, v, (above > 0) & (place < most))
            count += tl.sum(above, 0)
    tl.store(sizes + n, tl.where(count == V, 0, count))


def logprob(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, *outputs: Tensor
) -> None:
    """Writes the outputs log-prob [N], entropy [N] and stats [N, 2]; all contiguous, checked by the caller, as below."""
    rows, by_row = outputs[0] if temperatures is None else temperatures, temperatures is not None
    if len(logits):
        logprob_kernel[(len(logits),)](
            logits, targets, rows, temperature, *outputs, logits.shape[1], BY_ROW=by_row, **LAUNCH
        )


def logprob_backward(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    entropy: Tensor,
    stats: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    source: Tensor | None,
    grad: Tensor,
) -> None:
    """Writes row i of `grad`, of any floating dtype: the gradient of row source[i] (None: i; negative: none) of the logits."""
    by_row = entropy if temperatures is None else temperatures
    given = (logits, targets, by_row, temperature, entropy, stats, grad_logprob, grad_entropy)
    flags = {"BY_ROW": temperatures is not None, "MOVES": source is not None}
    if len(grad):
        grid = (len(grad), triton.cdiv(logits.shape[1], LAUNCH["BLOCK"]))
        logprob_backward_kernel[grid](
            *given, targets if source is None else source, grad, logits.shape[1], **flags, **LAUNCH
        )


def sample(logits: Tensor, settings: list[Tensor], *outputs: Tensor) -> Tensor:
    """Writes the outputs token, log-prob and entropy [N]; returns the cuts [N]. `settings` are those of `ops.sample`, in order."""
    cuts = torch.empty_like(outputs[1])
    if len(logits):
        sample_kernel[(len(logits),)](logits, *settings, *outputs, cuts, logits.shape[1], **LAUNCH)
    return cuts


def keep(logits: Tensor, cuts: Tensor, kept: Tensor, sizes: Tensor) -> None:
    """Writes kept [N, most] int32 and sizes [N] int32 from the cuts of `sample`."""
    if len(logits):
        keep_kernel[(len(logits),)](logits, cuts, kept, sizes, logits.shape[1], kept.shape[1], **LAUNCH)
