"""Turns a step's work into tensors and runs the model on the paged KV: the only file of the engine that computes.

Shapes: T tokens of the step, S requests, N of them sampling, L layers, P pages, B page size, Hq/Hk heads, D head dim.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ids
from itertools import pairwise

import numpy as np
import torch
from duologue.kernels import ops
from duologue.kernels.softmax import Settings
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter, AdapterRows
from duologue.rollout.engine.scheduler import Work
from duologue.rollout.engine.sequence import Request
from torch import Tensor

EXCLUDED = -1e30  # a logit of probability 0 whose products stay finite


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


class Runner:
    """The model with its KV tensor. The weights are the trainer's own parameters, used in place."""

    def __init__(self, model: Decoder, n_pages: int, page_size: int) -> None:
        config = model.config
        weight = model.model.embed_tokens.weight
        self.model = model
        self.layers = model.paged_layers()
        self._sampled: list[Request] = []
        self._settings: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        self.page_size = page_size
        self.scale = config.head_dim**-0.5
        self.device = weight.device
        shape = (config.num_layers, 2, n_pages, page_size, config.num_kv_heads, config.head_dim)
        try:
            self.kv = torch.empty(shape, dtype=weight.dtype, device=self.device)
        except RuntimeError as error:  # torch raises its out-of-memory errors as RuntimeError on every device
            gib = np.prod(shape) * weight.element_size() / 2**30
            raise MemoryError(
                f"the KV pool of {n_pages * page_size} tokens takes {gib:.2f} GiB, which {self.device} does not have; "
                "lower rollout.cache_tokens"
            ) from error

    def copy_page(self, source: int, target: int) -> None:
        self.kv[:, :, target].copy_(self.kv[:, :, source])

    @torch.no_grad()
    def execute(
        self, works: list[Work], allowed: dict[int, Ids[int]], adapters: Ids[Adapter | None]
    ) -> tuple[list[int], list[float], list[float], list[array[int]]]:
        """Run a step: (token, log-prob, entropy, kept ids) for each work that samples, in order; `allowed` restricts rows of these."""
        token_ids, positions, attention, last = self._inputs(works)
        hidden_NH = self._hidden(token_ids, positions, attention, last, self._adapter_rows(works, adapters))
        if len(last) == 0:
            return [], [], [], []
        if allowed:
            logits_NV = self.model.head(hidden_NH)
            for row, ids in allowed.items():
                among = logits_NV[row, ids]
                logits_NV[row] = EXCLUDED
                logits_NV[row, ids] = among
            token, logprob, entropy, kept, ends = ops.sample(logits_NV, *self._sampling(works))
        else:
            token, logprob, entropy, kept, ends = ops.linear_sample(hidden_NH, self.model.head_weight, *self._sampling(works))
        flat, bounds = array("i", kept.cpu().numpy().tobytes()), pairwise(ends.tolist())
        supports = [flat[a:b] for a, b in bounds]
        for row, ids in allowed.items():  # what was drawn from: the allowed ids, or those of them that truncation kept
            supports[row] = array("i", sorted(set(ids) & set(supports[row]) if supports[row] else set(ids)))
        return token.tolist(), logprob.tolist(), entropy.tolist(), supports

    def _adapter_rows(self, works: list[Work], adapters: Ids[Adapter | None]) -> AdapterRows:
        """The step's tokens by the adapter of their branch."""
        chosen = [w.request.branch.adapter for w in works]
        if len(used := set(chosen)) == 1:
            only = adapters[used.pop()]
            return AdapterRows([] if only is None else [(only, None)])
        row = np.repeat(chosen, [w.n_tokens for w in works])
        found = ((adapters[i], row == i) for i in sorted(used))
        return AdapterRows([(adapter, self._tensor(np.flatnonzero(rows))) for adapter, rows in found if adapter is not None])

    def _hidden(self, token_ids: Tensor, positions: Tensor, attention: PagedAttention, last: Tensor, lora: AdapterRows) -> Tensor:
        """[N, H], the rows `last` [N] of the step's T."""
        if self.layers is None or lora.parts:
            return self.model.hidden(token_ids, positions, attention, lora)[last]
        return self.layers(
            token_ids, last, *self.model.rotary_tables(positions), positions, self.kv, attention.slots, attention.block_table,
            attention.cu_seqlens, attention.context_lens,
        )  # fmt: skip

    def _inputs(self, works: list[Work]) -> tuple[Tensor, Tensor, PagedAttention, Tensor]:
        branches = [w.request.branch for w in works]
        start = np.array([b.n_cached for b in branches])
        n = np.array([w.n_tokens for w in works])
        ends = np.cumsum(n)
        row = np.repeat(np.arange(len(works)), n)  # [T] the request of each token
        position = np.arange(ends[-1]) - (ends - n)[row] + start[row]
        pages = np.zeros((len(works), max(len(b.pages) for b in branches)), dtype=np.int32)
        for i, branch in enumerate(branches):
            pages[i, : len(branch.pages)] = branch.pages
        slots = pages[row, position // self.page_size].astype(np.int64) * self.page_size + position % self.page_size
        ids: list[int] = []
        for branch, work in zip(branches, works, strict=True):
            ids += branch.token_ids[branch.n_cached : branch.n_cached + work.n_tokens]
        samples = np.array([w.samples for w in works], dtype=bool)
        attention = PagedAttention(
            kv=self.kv,
            slots=self._tensor(slots),
            block_table=self._tensor(pages),
            cu_seqlens=self._tensor(np.concatenate(([0], ends)).astype(np.int32)),
            context_lens=self._tensor((start + n).astype(np.int32)),
            scale=self.scale,
        )
        last = self._tensor(ends[samples] - 1)
        return self._tensor(np.array(ids)), self._tensor(position), attention, last

    def _sampling(self, works: list[Work]) -> Settings:
        """The arguments of `ops.sample` after the logits. The noise counter is the index of the token to be drawn."""
        requests = [w.request for w in works if w.samples]
        if self._settings is None or requests != self._sampled:  # while nobody comes or goes only the counters change
            params = [r.params for r in requests]
            self._sampled = requests
            self._settings = (
                self._tensor(np.array([p.temperature for p in params], dtype=np.float32)),
                self._tensor(np.array([p.top_k for p in params], dtype=np.int32)),
                self._tensor(np.array([p.top_p for p in params], dtype=np.float32)),
                self._tensor(np.array([p.min_p for p in params], dtype=np.float32)),
                self._tensor(np.array([r.seed for r in requests], dtype=np.int64)),
            )
        return *self._settings, self._tensor(np.array([len(r.branch.token_ids) for r in requests], dtype=np.int64))

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)
