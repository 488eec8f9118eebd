"""Causal attention on CUDA over packed or paged keys: kernels and launchers of kernels/attention.py.

The keys of a sequence are cut into chunks of 256 from its first token on; each chunk gives a softmax of its
own, and chunks are merged in order (`_merge`). Training, prefill and decode run the same code on tiles of 64
rows, so a row's bits depend on its keys alone. Where programs are few, chunks are computed side by side and
merged by a second kernel. Decode steps have a kernel of their own (attention_decode.py). Exponents are base
2.

The rows of a sequence and key head are numbered x = query * R + r, R = Hq / Hk the query heads of a key head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from duologue.kernels.gpu.launcher import capability, launch
from torch import Tensor

CHUNK = 256  # keys
FILL = 512  # programs that fill a GPU
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.44269504)


@triton.jit
def sequence_of(cu_seqlens, S, R, ROWS: tl.constexpr):
    """Block program_id(0) of `ROWS` rows: its sequence s (the last with cu_seqlens[s] * R // ROWS + s at most
    the block's number), the sequence's first token, its length, and the rows, which may lie past the end."""
    block = tl.program_id(0)
    low = block * 0
    high = S
    while high - low > 1:
        mid = (low + high) // 2
        before = tl.load(cu_seqlens + mid) * R // ROWS + mid <= block
        low = tl.where(before, mid, low)
        high = tl.where(before, high, mid)
    begin = tl.load(cu_seqlens + low)
    rows = (block - (begin * R // ROWS + low)) * ROWS + tl.arange(0, ROWS)
    return low.to(tl.int64), begin.to(tl.int64), tl.load(cu_seqlens + low + 1) - begin, rows


@triton.jit
def _merge(top, total, acc, next_top, next_total, next_acc):
    """The states of rows (largest score, sum of weights, sum of weighted values) and of their next chunk, as
    one."""
    highest = tl.maximum(top, next_top)
    old = tl.exp2(top - highest)
    new = tl.exp2(next_top - highest)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), next_acc * new[:, None])
    return highest, tl.fma(total, old, next_total * new), acc


@triton.jit
def of_chunk(
    q,
    k,
    v,
    table,
    begin,
    g,
    start,
    seen,
    limit,
    Hk,
    D,
    scale,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The state of rows q [ROWS, BLOCK] over the chunk from key `start` on, of which row i sees keys below
    seen[i] <= limit."""
    top = tl.full((q.shape[0],), LOWEST, tl.float32)
    total = tl.zeros_like(top)
    acc = tl.zeros(q.shape, tl.float32)
    d = tl.arange(0, q.shape[1])
    for first in range(start, tl.minimum(start + CHUNK, limit), KEYS):
        n = tl.arange(0, KEYS)
        if PAGE and PAGE % KEYS == 0:  # a tile of keys lies in one page: one address and 32-bit numbers
            page = tl.load(table + first // PAGE).to(tl.int64)
            at = (page * PAGE + first % PAGE) * (Hk * D)
            within = (n * Hk + g)[:, None] * D + d[None, :]
            keys = k + at + within
            values = v + at + within
            there = n < limit - first
            visible = n[None, :] < (seen - first)[:, None]
        else:
            key = first + n
            token = begin + key
            if PAGE:
                token = tl.load(table + key // PAGE, key < limit, 0).to(tl.int64) * PAGE + key % PAGE
            at = ((token * Hk + g) * D)[:, None] + d[None, :]
            keys = k + at
            values = v + at
            there = key < limit
            visible = key[None, :] < seen[:, None]
        real = there[:, None] & (d < D)[None, :]
        score = tl.dot(q, tl.trans(tl.load(keys, real, 0.0)), input_precision="tf32x3") * scale
        z = tl.where(visible, score, LOWEST)
        highest = tl.maximum(top, tl.max(z, 1))
        p = tl.where(visible, tl.exp2(z - highest[:, None]), 0.0)
        old = tl.exp2(top - highest)
        total = tl.fma(total, old, tl.sum(p, 1))
        top = highest
        acc = tl.dot(p.to(q.dtype), tl.load(values, real, 0.0), acc * old[:, None], input_precision="tf32x3")
    return top, total, acc


@triton.jit(do_not_specialize=["S", "max_pages", "n_chunks"])
def attention_kernel(
    q,
    k,
    v,
    out,
    stats,
    table,
    cu_seqlens,
    context_lens,
    scale,
    S,
    Hq,
    Hk,
    D,
    max_pages,
    n_chunks,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block, g): out [T, Hq, D] and stats [T, Hq, 2], the largest score and 1 / sum. With SPLIT
    program (block, g, c): the state of chunk c, in out [T, Hq, n_chunks, D] and stats [T, Hq, n_chunks, 2].
    """
    R = Hq // Hk
    s, begin, n, x = sequence_of(cu_seqlens, S, R, ROWS)
    g = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    if tl.min(x, 0) < n * R:
        seen = x // R + 1 + (tl.load(context_lens + s) - n if PAGE else 0)
        row = (begin + x // R) * Hq + g * R + x % R
        mine = x < n * R
        limit = tl.max(tl.where(mine, seen, 0), 0)
        block_table = table + s * max_pages
        tile = tl.load(q + row[:, None] * D + d[None, :], mine[:, None] & (d < D)[None, :], 0.0)
        if SPLIT:
            start = tl.program_id(2) * CHUNK
            if start < limit:
                top, total, acc = of_chunk(
                    tile, k, v, block_table, begin, g, start, seen, limit, Hk, D, scale, PAGE, CHUNK, KEYS
                )
                row = row * n_chunks + tl.program_id(2)
                tl.store(stats + 2 * row, top, mine)
                tl.store(stats + 2 * row + 1, total, mine)
                tl.store(out + row[:, None] * D + d[None, :], acc, mine[:, None] & (d < D)[None, :])
        else:
            top = tl.full((ROWS,), LOWEST, tl.float32)
            total = tl.zeros_like(top)
            acc = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, limit, CHUNK):
                part_top, part_total, part = of_chunk(
                    tile, k, v, block_table, begin, g, start, seen, limit, Hk, D, scale, PAGE, CHUNK, KEYS
                )
                top, total, acc = _merge(top, total, acc, part_top, part_total, part)
            tl.store(stats + 2 * row, top, mine)
            tl.store(stats + 2 * row + 1, 1.0 / total, mine)
            done = (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty)
            tl.store(out + row[:, None] * D + d[None, :], done, mine[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["n_chunks"])
def merge_kernel(
    parts,
    part_stats,
    out,
    context_lens,
    Hq,
    D,
    n_chunks,
    COUNTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: row i of out [T * Hq, D]; chunks that it does not see have a sum of 0. With COUNTED it is
    the row of sequence i // Hq, and sees no more than that sequence has.
    """
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    d = tl.arange(0, BLOCK)
    top = tl.full((1,), LOWEST, tl.float32)
    total = tl.zeros_like(top)
    acc = tl.zeros((1, BLOCK), tl.float32)
    seen = n_chunks
    if COUNTED:
        seen = tl.cdiv(tl.load(context_lens + tl.program_id(0) // Hq), CHUNK)
    for c in range(seen):
        at = row * n_chunks + c
        next_total = tl.load(part_stats + 2 * at + 1)
        there = next_total > 0
        next_top = tl.where(there, tl.load(part_stats + 2 * at), LOWEST)
        part = tl.load(parts + at[:, None] * D + d[None, :], there[:, None] & (d < D)[None, :], 0.0)
        top, total, acc = _merge(top, total, acc, next_top, next_total, part)
    done = (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * D + d[None, :], done, (d < D)[None, :])


def tile(D: int, narrow: bool, form: str, chip: int) -> dict[str, Any]:
    """The launch of a form, "packed" or "paged" (forward), "grad_query" or "grad_key", for head dim D, inputs
    of 16 bits or of 32, and a GPU of this capability; whatever the number of rows, for bits depend on it.

    Warps: on Hopper eight compute the same scores twice and let one block fill a multiprocessor, four do not
    and spill at most 48 bytes; before, four spill 300, and Blackwell's products belong to no warp. Forward
    forms have the same, so that decode and training have the same bits. Stages change none.
    """
    size = 64 if narrow else 32
    block = max(16, triton.next_power_of_2(D))
    hopper = 90 <= chip < 100 or chip == 0
    few = hopper or (chip >= 100 and form.startswith("grad"))
    warps = 4 if block <= 64 or (block == 128 and narrow and few) else 8
    stages = 3 if hopper and form == "paged" else 2
    fixed = {"ROWS": size, "KEYS": size, "BLOCK": block, "num_warps": warps}
    return {**fixed, "num_stages": stages if narrow else 1, "enable_fp_fusion": False}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    table: Tensor | None = None,
    context_lens: Tensor | None = None,
    split: bool | None = None,
) -> Tensor:
    """Fills out [T, Hq, D], and stats [T, Hq, 2] if given. k, v [T, Hk, D], or pages [P, B, Hk, D] with table
    [S, max_pages].

    `split` forces chunks side by side (pages only) or in a loop; None chooses.
    """
    T, Hq, D = q.shape
    Hk = k.shape[-2]
    S = len(cu_seqlens) - 1
    page = 0
    max_pages = 0
    n_chunks = 1
    if table is None:
        table = context_lens = cu_seqlens
    else:
        page = k.shape[1]
        max_pages = table.shape[1]
        n_chunks = triton.cdiv(max_pages * page, CHUNK)
    form = "paged" if page else "packed"
    tiles = {**tile(D, q.element_size() == 2, form, capability(q)), "CHUNK": CHUNK, "PAGE": page}
    blocks = T * Hq // Hk // tiles["ROWS"] + 1  # of rows, but for one more per sequence
    if split is None:
        split = n_chunks > 1 and (blocks + S) * Hk < FILL

    def run(*out: Tensor) -> None:
        tensors = (q, k, v, *out, table, cu_seqlens, context_lens)
        sizes = (scale * LOG2_E.value, S, Hq, Hk, D, max_pages, n_chunks)
        grid = (blocks + S, Hk, n_chunks if split else 1)
        launch(attention_kernel, grid, *tensors, *sizes, SPLIT=split, **tiles)

    if T == 0:
        return out
    if not split:
        run(out, q.new_empty((T, Hq, 2), dtype=torch.float32) if stats is None else stats)
        return out
    parts = q.new_empty((T, Hq, n_chunks, D), dtype=torch.float32)
    part_stats = q.new_zeros((T, Hq, n_chunks, 2), dtype=torch.float32)
    run(parts, part_stats)
    merge = {"BLOCK": tiles["BLOCK"], "num_warps": 1, "enable_fp_fusion": False, "CHUNK": CHUNK}
    rows = (parts, part_stats, out, context_lens, Hq, D, n_chunks)
    launch(merge_kernel, (T * Hq,), *rows, COUNTED=False, **merge)
    return out
