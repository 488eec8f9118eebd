"""Head and sampler in one pass over the weight on CUDA: no logits are stored. Kernel and launcher of `ops.linear_sample`.

A program multiplies a tile of rows with several tiles of the vocabulary in turn and keeps five numbers per row: the largest logit, the
sum and the weighted sum of exponentials below it, the best of logit plus noise, and that token's logit. Programs' numbers are merged
at the end. The order of sums is not that of `logprob`, so this is for exact = False; the noise, and so the draw, is that of `sample`.

Shapes: N rows, K hidden, V vocabulary, P programs per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = 8  # of the vocabulary per program
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _noise(seed, position, v):
    """Gumbel noise [ROWS, COLUMNS] of tokens v (which begin at a multiple of 4) for rows' seeds and positions [ROWS, 1]; the words of
    gpu_softmax._noise."""
    low, high = (position & 4294967295).to(tl.uint32), ((position >> 32) & 4294967295).to(tl.uint32)
    block = v.to(tl.uint32)[None, :] + low * 0
    a, b, c, d = tl.philox(seed, block, block * 0, block * 0 + low, block * 0 + high)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4 * a.shape[1]))
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    w = 1.0 - u
    return -tl.log(tl.where(w == 1.0, u, u * (tl.log(w) / (w - 1.0))))


@triton.jit(do_not_specialize=["N"])
def linear_sample_kernel(
    hidden,
    weight,
    bias,
    temperature,
    seed,
    position,
    numbers,
    ids,
    softcap,
    N,
    V,
    K,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
):
    """numbers [5, N, P] and ids [N, P]; program (i, p): row tile i, part p of the vocabulary."""
    part, parts = tl.program_id(1), tl.num_programs(1)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mine = i < N
    heat = tl.load(temperature + i, mine, 1.0)
    inverse = (1.0 / tl.where(heat == 0, 1.0, heat))[:, None]
    key, counter = tl.load(seed + i, mine, 0)[:, None], tl.load(position + i, mine, 0)[:, None]
    top, best = tl.full((ROWS,), LOWEST, tl.float32), tl.full((ROWS,), -float("inf"), tl.float32)
    total, weighted, chosen = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    token = tl.zeros((ROWS,), tl.int32)
    for turn in range(TILES):
        first = (part * TILES + turn) * COLUMNS
        if first < V:
            v = first + tl.arange(0, COLUMNS)
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, K, STEP):
                k = start + tl.arange(0, STEP)
                a = tl.load(hidden + i[:, None] * K + k[None, :], mine[:, None] & (k < K)[None, :], 0.0)
                b = tl.load(
                    weight + v.to(tl.int64)[None, :] * K + k[:, None],
                    (v < V)[None, :] & (k < K)[:, None],
                    0.0,
                )
                acc = tl.dot(a, b, acc, input_precision="ieee")
            if HAS_BIAS:
                acc += tl.load(bias + v, v < V, 0.0).to(tl.float32)[None, :]
            if CAPPED:
                fall = tl.exp(-2.0 * tl.abs(acc / softcap))
                acc = tl.where(acc < 0, -softcap, softcap) * ((1.0 - fall) / (1.0 + fall))
            z = tl.where((v < V)[None, :], acc * inverse, LOWEST)
            most = tl.maximum(top, tl.max(z, 1))
            sink, t = top - most, z - most[:, None]
            p, shrink = tl.exp(t), tl.exp(sink)
            weighted = (weighted + total * sink) * shrink + tl.sum(p * tl.where((v < V)[None, :], t, 0.0), 1)
            total, top = total * shrink + tl.sum(p, 1), most
            noise = _noise(
                key,
                counter,
                part * TILES * (COLUMNS // 4) + turn * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4),
            )
            score = tl.where((v < V)[None, :], z + tl.where(heat[:, None] > 0, noise, 0.0), -float("inf"))
            here = tl.max(score, 1)
            at = tl.min(tl.where(score == here[:, None], v[None, :], 2147483647), 1)
            wins = here > best
            chosen = tl.where(wins, tl.sum(tl.where(v[None, :] == at[:, None], z, 0.0), 1), chosen)
            token, best = tl.where(wins, at, token), tl.maximum(best, here)
    out = i * parts + part
    size = N.to(tl.int64) * parts
    tl.store(numbers + out, top, mine)
    tl.store(numbers + size + out, total, mine)
    tl.store(numbers + 2 * size + out, weighted, mine)
    tl.store(numbers + 3 * size + out, best, mine)
    tl.store(numbers + 4 * size + out, chosen, mine)
    tl.store(ids + out, token, mine)


def tile(N: int, narrow: bool) -> dict[str, int]:
    """The launch for N rows and inputs of 16 bits or of 32."""
    if not narrow:
        return {"ROWS": 16, "COLUMNS": 64, "STEP": 32, "TILES": TILES, "num_warps": 4, "num_stages": 2}
    rows = 16 if N <= 16 else 32 if N <= 32 else 64
    return {
        "ROWS": rows,
        "COLUMNS": 64,
        "STEP": 64,
        "TILES": TILES,
        "num_warps": 8 if rows == 64 else 4,
        "num_stages": 4,
    }


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token [N] int64, log-prob [N], entropy [N]); all contiguous, checked by the caller. Nothing here waits for the device."""
    (N, K), V = hidden.shape, len(weight)
    launch = tile(N, hidden.element_size() == 2)
    parts = triton.cdiv(V, launch["COLUMNS"] * TILES)
    numbers, ids = (
        hidden.new_empty((5, N, parts), dtype=torch.float32),
        hidden.new_empty((N, parts), dtype=torch.int32),
    )
    if N:
        linear_sample_kernel[(triton.cdiv(N, launch["ROWS"]), parts)](
            hidden,
            weight,
            hidden if bias is None else bias,
            temperature,
            seed,
            position,
            numbers,
            ids,
            softcap or 1.0,
            N,
            V,
            K,
            HAS_BIAS=bias is not None,
            CAPPED=softcap > 0,
            **launch,
        )
    tops, totals, weighted, bests, chosen = numbers
    top = tops.amax(1, keepdim=True)
    sink = tops - top
    total = (totals * sink.exp()).sum(1)
    log_sum = total.log()
    entropy = log_sum - ((weighted + totals * sink) * sink.exp()).sum(1) / total
    of = torch.where(bests == bests.amax(1, keepdim=True), ids.long(), V).argmin(
        1, keepdim=True
    )  # lowest id at ties
    return (
        ids.gather(1, of).squeeze(1).long(),
        chosen.gather(1, of).squeeze(1) - top.squeeze(1) - log_sum,
        entropy,
    )
