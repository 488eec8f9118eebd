"""The attention of the decoder over paged keys.

Shapes: T tokens of the step, S requests, L layers, P pages, B page size, Hk key heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from duologue.kernels import fused, ops
from duologue.kernels.attention import Work, decode_work
from torch import Tensor

LEAST_SHARED = 512  # keys in common that are worth a pass of their own: two chunks of the kernel


def shared_groups(
    table: np.ndarray, cached: np.ndarray, page_size: int, rows: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(starts [rows + 1], shared [rows]) int32 of neighbours that begin with the same pages; None if none do.

    table: [n, max_pages], the pages of each row; cached: [n], tokens of each that lie before its queries.
    With pages of 256 tokens, all but a row's last full:

        row   pages        group of rows
         0    4 5 6 | 9      0, 1    begin with 3 pages: 768 keys, read once for both
         1    4 5 6 | 11
         2    7 | 8          2       alone: reads its keys by itself
         3    2 3 | 10       3, 4    begin with 2 pages: 512 keys
         4    2 3 | 12               starts = 0 2 3 5 5 5, shared = 768 0 512 0 0

    Rows beyond those given are groups of one, and what is left over of the arrays are empty groups: their
    sizes depend on `rows` alone, as a CUDA graph wants it.
    """
    whole = cached // page_size
    agreeing = _agreeing(table, np.minimum(whole[1:], whole[:-1]))
    if agreeing.size == 0 or agreeing.max() * page_size < LEAST_SHARED:
        return None
    starts = [0]
    shared = [0]
    whole_pages = whole.tolist()
    common = whole_pages[0]  # pages that all rows of the present group begin with
    for row, n in enumerate(agreeing.tolist(), start=1):
        both = min(common, n)
        if both * page_size >= LEAST_SHARED:
            common = both
            shared[-1] = both * page_size
        else:
            common = whole_pages[row]
            starts.append(row)
            shared.append(0)
    starts += range(len(table), rows + 1)
    starts += [rows] * (rows + 1 - len(starts))
    shared += [0] * (rows - len(shared))
    return np.array(starts, dtype=np.int32), np.array(shared, dtype=np.int32)


def _agreeing(table: np.ndarray, most: np.ndarray) -> np.ndarray:
    """[n - 1] how many pages each row has in common with the next at their beginning, at most `most`."""
    width = int(most.max(initial=0))
    differs = np.ones((len(most), width + 1), dtype=bool)
    np.not_equal(table[1:, :width], table[:-1, :width], out=differs[:, :width])
    agreeing: np.ndarray = np.minimum(differs.argmax(1), most)
    return agreeing


@dataclass(kw_only=True, slots=True, eq=False)
class PagedAttention:
    """The attention context of one step: writes its K/V into the pages, then attends over each request's."""

    kv: Tensor  # [L, 2, P, B, Hk, D]
    slots: Tensor  # [T] page * B + offset
    block_table: Tensor  # [S, max_pages] int32
    cu_seqlens: Tensor  # [S + 1] int32, of the step's tokens
    context_lens: Tensor  # [S] int32, this step's tokens included
    scale: float
    groups: tuple[Tensor, Tensor] | None = None  # see `shared_groups`
    work: Work | None = None  # of a decode step, made by its first layer

    def __call__(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        k_pages, v_pages = self.kv[layer]
        ops.write_kv(k_TGD, v_TGD, k_pages, v_pages, self.slots)
        return self._attend(layer, q_TAD)

    def rotated(
        self,
        layer: int,
        q_TAD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        norms: tuple[Tensor, Tensor, float] | None,
        rotary: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """The same of q and k before norms (weights and eps) and rotation, where `fused.serves` them."""
        weights, eps = (None, 0.0) if norms is None else (norms[:2], norms[2])
        k_pages, v_pages = self.kv[layer]
        pages = (k_pages, v_pages)
        q_TAD = fused.rotate_write(q_TAD, k_TGD, v_TGD, weights, eps, rotary, pages, self.slots)
        return self._attend(layer, q_TAD)

    def _attend(self, layer: int, q_TAD: Tensor) -> Tensor:
        k_pages, v_pages = self.kv[layer]
        if self.work is None and len(q_TAD) == len(self.context_lens):  # one of each: no sequence has none
            heads = q_TAD.shape[1]
            self.work = decode_work(heads, k_pages, self.block_table, self.context_lens, self.groups)
        lengths = (self.block_table, self.cu_seqlens, self.context_lens)
        return ops.paged_attention(q_TAD, k_pages, v_pages, *lengths, self.scale, self.groups, self.work)
