"""Attention of a decode step on CUDA: one query of each sequence over its pages. A work list, made once per
step on the device, has an item for each chunk of keys, once for all the sequences that share it; a fixed
number of programs takes the items in turn, so neither long sequences nor short ones leave the chip idle; a
second kernel merges a row's chunks in order.

    sequences, chunks of keys       items (sequence, sequences, chunk)
    0   A B c                       (0, 2, 0) (0, 2, 1) (0, 1, 2)
    1   A B d e                     (1, 1, 2) (1, 1, 3)
    2   f                           (2, 1, 0)

Chunks and merging are those of attention.py, and so are the bits. The rows of an item and key head are
numbered x = sequence * R + r, R = Hq / Hk the query heads of a key head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from duologue.kernels.gpu.attention import CHUNK, LOG2_E, merge_kernel, of_chunk, tile
from duologue.kernels.gpu.launcher import capability, launch, multiprocessors
from torch import Tensor

BLOCKS = 2  # of a multiprocessor, whose registers they fill
Pair = tuple[Tensor, Tensor]


@triton.jit(do_not_specialize=["max_pages", "n_chunks"])
def decode_attention_kernel(
    q,
    k,
    v,
    parts,
    part_stats,
    table,
    context_lens,
    items,
    n_items,
    scale,
    Hq,
    Hk,
    D,
    max_pages,
    n_chunks,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state of the rows of each item: parts [S, Hq, n_chunks, D], part_stats [S, Hq, n_chunks, 2]."""
    R = Hq // Hk
    x = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    for number in range(tl.program_id(0), tl.load(n_items) * Hk, tl.num_programs(0)):
        item = items + number // Hk * 3
        g = number % Hk
        s = tl.load(item).to(tl.int64)
        mine = x < tl.load(item + 1) * R
        chunk = tl.load(item + 2)
        seen = tl.load(context_lens + s + x // R, mine, 0)
        row = (s + x // R) * Hq + g * R + x % R
        real = mine[:, None] & (d < D)[None, :]
        rows = tl.load(q + row[:, None] * D + d[None, :], real, 0.0)
        pages = table + s * max_pages
        start = chunk * CHUNK
        limit = tl.max(seen, 0)
        top, total, acc = of_chunk(
            rows, k, v, pages, s * 0, g, start, seen, limit, Hk, D, scale, PAGE, CHUNK, KEYS
        )
        row = row * n_chunks + chunk
        tl.store(part_stats + 2 * row, top, mine)
        tl.store(part_stats + 2 * row + 1, total, mine)
        tl.store(parts + row[:, None] * D + d[None, :], acc, real)


def work_of(context_lens: Tensor, most_keys: int, ratio: int, groups: Pair | None, narrow: bool) -> Pair:
    """For sequences of context_lens [S] int32, at most `most_keys`, whose key heads have `ratio` query heads
    each, of 16 bits or of 32. `groups` and what is returned are those of kernels/attention.py.
    """
    rows = tile(1, narrow, "paged", 0)["ROWS"]
    S = len(context_lens)
    n_chunks = triton.cdiv(most_keys, CHUNK)
    s = torch.arange(S, dtype=torch.int32, device=context_lens.device).unsqueeze(1)
    c = torch.arange(n_chunks, dtype=torch.int32, device=context_lens.device).unsqueeze(0)
    wanted = c * CHUNK < context_lens.unsqueeze(1)
    together = torch.ones_like(wanted, dtype=torch.int32)
    if groups is not None:
        starts, shared = groups
        group = torch.searchsorted(starts[1:], s.squeeze(1), right=True)
        begin, end = starts[group].unsqueeze(1), starts[group + 1].unsqueeze(1)
        common = (c + 1) * CHUNK <= shared[group].unsqueeze(1)
        most = max(rows // ratio, 1)
        # By the place alone: a row that has stopped sees one key, and reads on for those behind it.
        wanted = torch.where(common, (s - begin) % most == 0, wanted)
        together = torch.where(common, (end - s).clamp(max=most), 1)
    of_all = torch.stack((s.expand_as(wanted), together, c.expand_as(wanted)), -1).view(-1, 3)
    wanted = wanted.flatten()
    ends = wanted.cumsum(0, dtype=torch.int32)
    items = of_all.new_empty(len(of_all) + 1, 3)  # the last takes what is not wanted
    items[torch.where(wanted, ends - 1, len(of_all)).long()] = of_all.to(torch.int32)
    return items, ends[-1:]


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    table: Tensor,
    context_lens: Tensor,
    work: Pair,
) -> Tensor:
    """Fills out [S, Hq, D], as attention.forward does with one query of each sequence."""
    S, Hq, D = q.shape
    if S == 0:
        return out
    page, Hk = k.shape[1:3]
    max_pages = table.shape[1]
    n_chunks = triton.cdiv(max_pages * page, CHUNK)
    parts = q.new_empty((S, Hq, n_chunks, D), dtype=torch.float32)
    part_stats = q.new_empty((S, Hq, n_chunks, 2), dtype=torch.float32)
    tiles = tile(D, q.element_size() == 2, "paged", capability(q))
    tensors = (q, k, v, parts, part_stats, table, context_lens, *work)
    sizes = (scale * LOG2_E.value, Hq, Hk, D, max_pages, n_chunks)
    grid = (min(BLOCKS * multiprocessors(q), S * n_chunks * Hk),)
    launch(decode_attention_kernel, grid, *tensors, *sizes, PAGE=page, CHUNK=CHUNK, **tiles)
    merge = {"BLOCK": tiles["BLOCK"], "num_warps": 1, "enable_fp_fusion": False, "CHUNK": CHUNK}
    rows = (parts, part_stats, out, context_lens, Hq, D, n_chunks)
    launch(merge_kernel, (S * Hq,), *rows, COUNTED=True, **merge)
    return out
