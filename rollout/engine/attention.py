"""The attention of the decoder over paged keys.

Shapes: T tokens of the step, S requests, L layers, P pages, B page size, Hk key heads, D head dim.
"""

from __future__ import annotations

from duologue.kernels import ops
from torch import Tensor


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
    ) -> None:
        self.kv = kv
        self.slots = slots
        self.block_table = block_table
        self.cu_seqlens = cu_seqlens
        self.context_lens = context_lens
        self.scale = scale

    def __call__(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        k_pages, v_pages = self.kv[layer]
        ops.write_kv(k_TGD, v_TGD, k_pages, v_pages, self.slots)
        return ops.paged_attention(
            q_TAD, k_pages, v_pages, self.block_table, self.cu_seqlens, self.context_lens, self.scale
        )
