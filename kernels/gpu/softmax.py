"""Log-prob, entropy and sampling on CUDA: kernels and launchers of kernels/softmax.py.

A program has a row to itself and reads it in blocks, each lane with a running softmax of its own; one routine
takes a row's statistics for all, so what the sampler reports is what training computes. The noise has the
words and uniforms of reference.py. `noise` and `capped` also serve the other kernels that draw or read
logits.

Shapes: N rows, V vocabulary. Pointers to one number per row have its name in the plural.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from duologue.kernels.gpu.launcher import launch
from torch import Tensor

# Without fusion, which differs by kernel.
LAUNCH: dict[str, Any] = {"BLOCK": 2048, "num_warps": 8, "enable_fp_fusion": False}
LOWEST = tl.constexpr(-1e30)
NONE = tl.constexpr(-float("inf"))


@triton.jit
def noise(seed, position, block):
    """Gumbel noise of four tokens per entry of `block` (token // 4), in order along the last axis; seed and
    position broadcast."""
    low = (position & 4294967295).to(tl.uint32)
    high = ((position >> 32) & 4294967295).to(tl.uint32)
    block = block.to(tl.uint32) + low * 0
    a, b, c, d = tl.philox(seed, block, block * 0, block * 0 + low, block * 0 + high)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    words = tl.reshape(words, block.shape[:-1] + (4 * block.shape[-1],))  # noqa: RUF005
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    w = 1.0 - u  # -log1p(-u) by Kahan's correction of log(w) for the rounding of w
    return -tl.log(tl.where(w == 1.0, u, u * (tl.log(w) / (w - 1.0))))


@triton.jit
def capped(x, softcap):
    """softcap tanh(x / softcap); near 0 by Cephes' polynomial, which keeps the last bits."""
    y = x / softcap
    z = y * y
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(tl.abs(y), 20.0)) + 1.0)
    return softcap * tl.where(tl.abs(y) < 0.625, p * z * y + y, tl.where(y < 0, -far, far))


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
    scale = inverse * 1.44269504
    top = tl.full((BLOCK,), -3e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = _logits(row, start + tl.arange(0, BLOCK), V, cut)
        highest = tl.maximum(top, x)
        delta = _exponent(top, highest, scale)  # what has been summed is lower by this, base 2
        t = _exponent(x, highest, scale)
        shrink = tl.exp2(delta)
        p = tl.exp2(t)
        weighted = (weighted + total * delta) * shrink + p * t  # of the total so far
        total = total * shrink + p
        top = highest
    highest = tl.max(top, 0)
    delta = _exponent(top, highest, scale)
    weighted = tl.sum((weighted + total * delta) * tl.exp2(delta), 0)
    total = tl.sum(total * tl.exp2(delta), 0)
    log_sum = tl.log(total)
    return highest, log_sum, log_sum - weighted / total * 0.693147181


@triton.jit
def logprob_kernel(
    logits,
    targets,
    temperatures,
    temperature,
    logprobs,
    entropies,
    stats,
    V,
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + n)
    inverse = 1.0 / (tl.load(temperatures + n) if BY_ROW else temperature)
    top, log_sum, entropy = _row_stats(logits + n * V, V, inverse, NONE, BLOCK)
    x = tl.load(logits + n * V + target, (target >= 0) & (target < V), float("nan")).to(tl.float32)
    tl.store(logprobs + n, (x - top) * inverse - log_sum)
    tl.store(entropies + n, entropy)
    tl.store(stats + 2 * n, top)
    tl.store(stats + 2 * n + 1, log_sum)


@triton.jit
def logprob_backward_kernel(
    logits,
    targets,
    temperatures,
    temperature,
    entropies,
    stats,
    grad_logprobs,
    grad_entropies,
    source,
    grad,
    V,
    BY_ROW: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d logprob / dz_v = [v = target] - p_v; d entropy / dz_v = -p_v (log p_v + entropy); z = logits /
    temperature. May be in place. With MOVES a row of `grad` is that of row source[row], and left alone where
    that is negative."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(source + row) if MOVES else row
    if n < 0:
        return
    inverse = 1.0 / (tl.load(temperatures + n) if BY_ROW else temperature)
    grad_logprob = tl.load(grad_logprobs + n) * inverse
    grad_entropy = tl.load(grad_entropies + n) * inverse
    x = _logits(logits + n * V, v, V, NONE)
    logp = _exponent(x, tl.load(stats + 2 * n), inverse) - tl.load(stats + 2 * n + 1)
    at_target = tl.where(v == tl.load(targets + n), grad_logprob, 0.0)
    dz = at_target - tl.exp(logp) * (grad_logprob + grad_entropy * (logp + tl.load(entropies + n)))
    tl.store(grad + row * V + v, dz.to(grad.dtype.element_ty), v < V)


@triton.jit
def _order(x):
    """Integers in the order of the floats; of such an integer's bits, the float."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _above(row, V, cut, top, scale, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """(weight, number) of the logits above `cut`; the weight is their number, or the sum of 2^((logit - top)
    * scale)."""
    weight = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        x = _logits(row, start + tl.arange(0, BLOCK), V, cut)
        count += (x > NONE).to(tl.int32)
        weight += tl.exp2(_exponent(x, top, scale)) if WEIGHTED else (x > NONE).to(tl.float32)
    return tl.sum(weight, 0), tl.sum(count, 0)


@triton.jit
def _cut_at(row, V, cut, top, scale, share, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The cut, at least `cut`, below the last logit that has less than the target above it: `share`, or if
    WEIGHTED this share of what is above `cut`. Bisects the floats in between until one logit is left."""
    weight, above_low = _above(row, V, cut, top, scale, WEIGHTED, BLOCK)
    target = share * weight if WEIGHTED else share
    low = _order(cut).to(tl.int64)
    high = _order(top).to(tl.int64)
    above_high = 0
    while (high - low > 1) & (above_low - above_high > 1):
        mid = low + (high - low) // 2
        threshold = _order(mid.to(tl.int32)).to(tl.float32, bitcast=True)
        weight, count = _above(row, V, threshold, top, scale, WEIGHTED, BLOCK)
        stays = weight < target
        low = tl.where(stays, low, mid)
        above_low = tl.where(stays, above_low, count)
        high = tl.where(stays, mid, high)
        above_high = tl.where(stays, count, above_high)
    return _order(low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def sample_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    tokens,
    logprobs,
    entropies,
    cuts,
    V,
    BLOCK: tl.constexpr,
):
    """Also stores the cut: the support is the tokens with a logit above it, and log-prob and entropy are over
    these."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * V
    temperature = tl.load(temperatures + n)
    inverse = 1.0 / tl.where(temperature == 0, 1.0, temperature)
    top_k = tl.load(top_ks + n)
    top_p = tl.load(top_ps + n)
    min_p = tl.load(min_ps + n)
    top, log_sum, entropy = _row_stats(row, V, inverse, NONE, BLOCK)
    cut = top * 0 + NONE
    scale = inverse * 1.44269504
    if (temperature > 0) & (top_k > 0) & (top_k < V):
        cut = _cut_at(row, V, cut, top, scale, top_k.to(tl.float32), False, BLOCK)
    if (temperature > 0) & (top_p < 1):
        cut = _cut_at(row, V, cut, top, scale, top_p, True, BLOCK)
    if (temperature > 0) & (min_p > 0):
        cut = tl.maximum(cut, _order(_order(top + tl.log(min_p) / inverse) - 1).to(tl.float32, bitcast=True))
    if cut > NONE:
        top, log_sum, entropy = _row_stats(row, V, inverse, cut, BLOCK)
    best = tl.full((BLOCK,), NONE, tl.float32)
    first = tl.zeros((BLOCK,), tl.int32)
    seed = tl.load(seeds + n)
    position = tl.load(positions + n)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        score = (_logits(row, v, V, cut) - top) * inverse
        if temperature > 0:
            score += noise(seed, position, start // 4 + tl.arange(0, BLOCK // 4))
        first = tl.where(score > best, v, first)
        best = tl.maximum(score, best)
    chosen = tl.min(tl.where(best == tl.max(best, 0), first, V - 1), 0)
    tl.store(tokens + n, chosen.to(tl.int64))
    tl.store(logprobs + n, (tl.load(row + chosen).to(tl.float32) - top) * inverse - log_sum)
    tl.store(entropies + n, entropy)
    tl.store(cuts + n, cut)


@triton.jit
def support_kernel(logits, cuts, ids, sizes, V, limit, BLOCK: tl.constexpr):
    """The first `limit` ids of a row above its cut, ascending; the number of all of them, 0 when nothing was
    cut off."""
    n = tl.program_id(0).to(tl.int64)
    cut = tl.load(cuts + n)
    count = 0
    if cut > NONE:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            above = (_logits(logits + n * V, v, V, cut) > NONE).to(tl.int32)
            place = count + tl.cumsum(above, 0) - above
            tl.store(ids + n * limit + place, v, (above > 0) & (place < limit))
            count += tl.sum(above, 0)
    tl.store(sizes + n, tl.where(count == V, 0, count))


def logprob(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, *outputs: Tensor
) -> None:
    """Writes the outputs log-prob [N], entropy [N] and stats [N, 2]; all contiguous, checked by the caller,
    as below."""
    by_row = outputs[0] if temperatures is None else temperatures
    tensors = (logits, targets, by_row, temperature, *outputs)
    if len(logits):
        grid = (len(logits),)
        launch(logprob_kernel, grid, *tensors, logits.shape[1], BY_ROW=temperatures is not None, **LAUNCH)


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
    """Writes row i of `grad`, of any floating dtype: the gradient of row source[i] (None: i; negative: none)
    of the logits."""
    by_row = entropy if temperatures is None else temperatures
    rows = targets if source is None else source
    tensors = (logits, targets, by_row, temperature, entropy, stats, grad_logprob, grad_entropy, rows, grad)
    flags = {"BY_ROW": temperatures is not None, "MOVES": source is not None}
    if len(grad):
        V = logits.shape[1]
        grid = (len(grad), triton.cdiv(V, LAUNCH["BLOCK"]))
        launch(logprob_backward_kernel, grid, *tensors, V, **flags, **LAUNCH)


def sample(logits: Tensor, settings: tuple[Tensor, ...], *outputs: Tensor) -> Tensor:
    """Writes the outputs token, log-prob and entropy [N]; returns the cuts [N]. `settings` are those of
    `ops.sample`, in order."""
    cuts = torch.empty_like(outputs[1])
    if len(logits):
        launch(sample_kernel, (len(logits),), logits, *settings, *outputs, cuts, logits.shape[1], **LAUNCH)
    return cuts


def keep(logits: Tensor, cuts: Tensor, ids: Tensor, sizes: Tensor) -> None:
    """Writes the supports' ids [N, limit] int32 and sizes [N] int32 from the cuts of `sample`."""
    if len(logits):
        tensors = (logits, cuts, ids, sizes)
        launch(support_kernel, (len(logits),), *tensors, logits.shape[1], ids.shape[1], **LAUNCH)
