"""Head and sampler in one pass over the weight on CUDA: no logits are stored. Kernel and launcher of
`ops.linear_sample`.

A program multiplies a tile of rows with several tiles of the vocabulary in turn and keeps five numbers per
row: the largest logit, the sum and the weighted sum of exponentials below it, the best of logit plus noise,
and that token's logit. These are merged at the end. The order of sums is not that of `logprob`, so this is
for exact = False; the noise, and so the draw, is that of `sample`.

Shapes: N rows, K hidden, V vocabulary, P programs per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from duologue.kernels.gpu.launcher import launch
from duologue.kernels.gpu.softmax import LOWEST, capped, noise
from torch import Tensor

TILES = 8  # of the vocabulary per program


@triton.jit(do_not_specialize=["N"])
def linear_sample_kernel(
    hidden,
    weight,
    bias,
    temperatures,
    seeds,
    positions,
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
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = i < N
    temperature = tl.load(temperatures + i, real, 1.0)
    inverse = (1.0 / tl.where(temperature == 0, 1.0, temperature))[:, None]
    seed = tl.load(seeds + i, real, 0)[:, None]
    position = tl.load(positions + i, real, 0)[:, None]
    top = tl.full((ROWS,), LOWEST, tl.float32)
    best = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros_like(top)
    weighted = tl.zeros_like(top)
    chosen = tl.zeros_like(top)
    token = tl.zeros((ROWS,), tl.int32)
    for tile_index in range(TILES):
        first = (part * TILES + tile_index) * COLUMNS
        if first < V:
            v = first + tl.arange(0, COLUMNS)
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, K, STEP):
                k = start + tl.arange(0, STEP)
                a = tl.load(hidden + i[:, None] * K + k[None, :], real[:, None] & (k < K)[None, :], 0.0)
                at = weight + v.to(tl.int64)[None, :] * K + k[:, None]
                b = tl.load(at, (v < V)[None, :] & (k < K)[:, None], 0.0)
                acc = tl.dot(a, b, acc, input_precision="ieee")
            if HAS_BIAS:
                acc += tl.load(bias + v, v < V, 0.0).to(tl.float32)[None, :]
            if CAPPED:
                acc = capped(acc, softcap)
            z = tl.where((v < V)[None, :], acc * inverse, LOWEST)
            highest = tl.maximum(top, tl.max(z, 1))
            delta = top - highest  # what has been summed is lower by this
            t = z - highest[:, None]
            p = tl.exp(t)
            shrink = tl.exp(delta)
            weighted = (weighted + total * delta) * shrink + tl.sum(p * tl.where((v < V)[None, :], t, 0.0), 1)
            total = total * shrink + tl.sum(p, 1)
            top = highest
            blocks = part * TILES * (COLUMNS // 4) + tile_index * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
            gumbel = noise(seed, position, blocks[None, :])
            score = z + tl.where(temperature[:, None] > 0, gumbel, 0.0)
            score = tl.where((v < V)[None, :], score, -float("inf"))
            best_here = tl.max(score, 1)
            token_here = tl.min(tl.where(score == best_here[:, None], v[None, :], 2147483647), 1)
            wins = best_here > best
            chosen = tl.where(wins, tl.sum(tl.where(v[None, :] == token_here[:, None], z, 0.0), 1), chosen)
            token = tl.where(wins, token_here, token)
            best = tl.maximum(best, best_here)
    out = i * parts + part
    size = N.to(tl.int64) * parts
    tl.store(numbers + out, top, real)
    tl.store(numbers + size + out, total, real)
    tl.store(numbers + 2 * size + out, weighted, real)
    tl.store(numbers + 3 * size + out, best, real)
    tl.store(numbers + 4 * size + out, chosen, real)
    tl.store(ids + out, token, real)


def tile(N: int, narrow: bool) -> dict[str, int]:
    """The launch for N rows and inputs of 16 bits or of 32."""
    fixed = {"COLUMNS": 64, "TILES": TILES}
    if not narrow:
        return {"ROWS": 16, "STEP": 32, **fixed, "num_warps": 4, "num_stages": 2}
    rows = min(64, max(16, triton.next_power_of_2(N)))
    return {"ROWS": rows, "STEP": 64, **fixed, "num_warps": 8 if rows == 64 else 4, "num_stages": 4}


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token [N] int64, log-prob [N], entropy [N]); all contiguous, checked by the caller. Nothing here waits
    for the device."""
    (N, K), V = hidden.shape, len(weight)
    tiles = tile(N, hidden.element_size() == 2)
    parts = triton.cdiv(V, tiles["COLUMNS"] * TILES)
    numbers = hidden.new_empty((5, N, parts), dtype=torch.float32)
    ids = hidden.new_empty((N, parts), dtype=torch.int32)
    if N:
        grid = (triton.cdiv(N, tiles["ROWS"]), parts)
        head = (hidden, weight, hidden if bias is None else bias)
        flags = {"HAS_BIAS": bias is not None, "CAPPED": softcap > 0}
        tensors = (*head, temperature, seed, position, numbers, ids)
        launch(linear_sample_kernel, grid, *tensors, softcap or 1.0, N, V, K, **flags, **tiles)
    return _merge(numbers, ids, V)


def _merge(numbers: Tensor, ids: Tensor, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the programs of a row found, as one."""
    tops, totals, weighted, bests, chosen = numbers
    top = tops.amax(1, keepdim=True)
    delta = tops - top
    total = (totals * delta.exp()).sum(1)
    log_sum = total.log()
    entropy = log_sum - ((weighted + totals * delta) * delta.exp()).sum(1) / total
    candidates = torch.where(bests == bests.amax(1, keepdim=True), ids.long(), V)
    winner = candidates.argmin(1, keepdim=True)  # the lowest id at ties
    token = ids.gather(1, winner).squeeze(1).long()
    logprob = chosen.gather(1, winner).squeeze(1) - top.squeeze(1) - log_sum
    return token, logprob, entropy
