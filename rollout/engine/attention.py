"""The attention of the decoder over paged keys.

Shapes: T tokens of the step, S requests, L layers, P pages, B page size, Hk key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from duologue.kernels import ops
from torch import Tensor

LEAST_SHARED = (
    512  # keys that rows must have in common to be worth a pass of their own: two chunks of the kernel
)


def shared_groups(
    pages: Sequence[Sequence[int]], cached: Sequence[int], page_size: int, rows: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(starts [rows + 1], shared [rows]) int32 of neighbours that begin with the same pages, or None when none do.

    `cached` tokens of each row lie before its queries. Rows beyond those given, and what is left over of the arrays, are groups of
    their own and empty ones: their sizes depend on `rows` alone, as a CUDA graph wants it.
    """
    starts, shared = [0], []
    common = list(pages[0][: cached[0] // page_size])
    for i in range(1, len(pages) + 1):
        if i < len(pages):
            both = zip(common, pages[i][: cached[i] // page_size], strict=False)
            n = next((k for k, (a, b) in enumerate(both) if a != b), min(len(common), cached[i] // page_size))
            if n * page_size >= LEAST_SHARED:
                common = common[:n]
                continue
        alone = i - starts[-1] == 1
        shared.append(0 if alone else len(common) * page_size)
        starts.append(i)
        common = list(pages[i][: cached[i] // page_size]) if i < len(pages) else []
    if not any(shared):
        return None
    starts += range(len(pages) + 1, rows + 1)
    starts += [rows] * (rows + 1 - len(starts))
    return np.array(starts, dtype=np.int32), np.array(shared + [0] * (rows - len(shared)), dtype=np.int32)


class PagedAttention:
    """The attention context of one step: writes the step's K/V into the pages, then attends over each request's pages."""

    def __init__(
        self,
        kv: Tensor,  # [L, 2, P, B, Hk, D]
        slots: Tensor,  # [T] page * B + offset
        block_table: Tensor,  # [S, max_pages] int32
        cu_seqlens: Tensor,  # [S + 1] int32, of the step's tokens
        context_lens: Tensor,  # [S] int32, this step's tokens included
        scale: float,
        groups: tuple[Tensor, Tensor] | None = None,  # see `shared_groups`
    ) -> None:
        self.kv = kv
        self.slots = slots
        self.block_table = block_table
        self.cu_seqlens = cu_seqlens
        self.context_lens = context_lens
        self.scale = scale
        self.groups = groups

    def __call__(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        k_pages, v_pages = self.kv[layer]
        ops.write_kv(k_TGD, v_TGD, k_pages, v_pages, self.slots)
        return ops.paged_attention(
            q_TAD,
            k_pages,
            v_pages,
            self.block_table,
            self.cu_seqlens,
            self.context_lens,
            self.scale,
            self.groups,
        )
