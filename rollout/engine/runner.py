"""Turns a step's work into tensors and runs the model on the paged KV: the only file of the engine that computes.

Shapes: T tokens of the step, S requests, N of them sampling, L layers, P pages, B page size, Hq/Hk heads, D head dim.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ids
from itertools import pairwise

import numpy as np
import torch
from duologue.kernels import backend, ops
from duologue.kernels.softmax import Settings
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter, AdapterRows
from duologue.rollout.engine.attention import PagedAttention, shared_groups
from duologue.rollout.engine.decode import DecodeLoop, Drawn, NativeLoop, page_table, sampling_settings
from duologue.rollout.engine.scheduler import Work
from duologue.rollout.engine.sequence import Request
from torch import Tensor

EXCLUDED = -1e30  # a logit of probability 0 whose products stay finite


def token_bytes(model: Decoder) -> int:
    """Of the KV of one token."""
    config = model.config
    return (
        config.num_layers
        * 2
        * config.num_kv_heads
        * config.head_dim
        * model.model.embed_tokens.weight.element_size()
    )


def measured_tokens(model: Decoder, page_size: int) -> int:
    """The tokens of a pool in 85 % of the memory that is free on the model's GPU; 65,536 on CPU. MemoryError when it holds no page."""
    device = model.model.embed_tokens.weight.device
    if device.type != "cuda":
        return 65_536
    torch.cuda.empty_cache()  # what torch holds and does not use counts as free
    free, total = torch.cuda.mem_get_info(device)
    tokens = int(0.85 * free) // token_bytes(model) // page_size * page_size
    if tokens < page_size:
        raise MemoryError(
            f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free on {device}, not enough for one page of {page_size} tokens of "
            f"{token_bytes(model)} bytes; use a smaller model, or set rollout.cache_tokens after freeing memory"
        )
    return tokens


class Runner:
    """The model with its KV tensor. The weights are the trainer's own parameters, used in place."""

    def __init__(self, model: Decoder, n_pages: int, page_size: int, decode_steps: int | None) -> None:
        config = model.config
        weight = model.model.embed_tokens.weight
        self.model = model
        self.layers = model.paged_layers()
        self._sampled: list[Request] = []
        self._settings: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        self.page_size = page_size
        self.scale = config.head_dim**-0.5
        self.device = weight.device
        on_cuda = self.device.type == "cuda"
        if decode_steps is None:
            decode_steps = 8 if on_cuda or self.layers is not None else 1
        self.shape = (
            config.num_layers,
            2,
            n_pages + (decode_steps > 1),
            page_size,
            config.num_kv_heads,
            config.head_dim,
        )
        self._kv: Tensor | None = None
        self.loop: NativeLoop | DecodeLoop | None = None
        if decode_steps > 1 and self.layers is not None:
            self.loop = NativeLoop(model, self.layers, decode_steps)
        elif decode_steps > 1:
            self.loop = DecodeLoop(model, n_pages, decode_steps, on_cuda)
        assert self.kv is not None  # what does not fit is said at once

    @property
    def kv(self) -> Tensor:
        """[L, 2, P, B, Hk, D]. MemoryError says what the pool takes."""
        if self._kv is None:
            dtype = self.model.model.embed_tokens.weight.dtype
            try:
                self._kv = torch.empty(self.shape, dtype=dtype, device=self.device)
            except (
                RuntimeError
            ) as error:  # torch raises its out-of-memory errors as RuntimeError on every device
                tokens = self.shape[2] * self.page_size
                gib = tokens * token_bytes(self.model) / 2**30
                raise MemoryError(
                    f"the KV pool of {tokens} tokens takes {gib:.2f} GiB, which {self.device} does not have; lower rollout.cache_tokens"
                ) from error
            if self.loop is not None:
                self.loop.use(self._kv)
        return self._kv

    def release_memory(self) -> None:
        self._kv = None
        if self.loop is not None:
            self.loop.kv = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_graphs(self) -> None:
        """What was captured with other adapters."""
        if self.loop is not None:
            self.loop.forget()

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
            settings = self._sampling(works)
            token, logprob, entropy, kept, ends = ops.sample(logits_NV, *settings)
        else:
            settings, exact = self._sampling(works), self.model.exact
            token, logprob, entropy, kept, ends = ops.linear_sample(
                hidden_NH, self.model.head_weight, *settings, exact=exact
            )
        flat, bounds = array("i", kept.cpu().numpy().tobytes()), pairwise(ends.tolist())
        supports = [flat[a:b] for a, b in bounds]
        for (
            row,
            ids,
        ) in allowed.items():  # what was drawn from: the allowed ids, or those of them that truncation kept
            supports[row] = array("i", sorted(set(ids) & set(supports[row]) if supports[row] else set(ids)))
        if allowed:  # scored over these as training will do it, to the bit
            rows = self._tensor(np.array(list(allowed)))
            of_rows = self._tensor(np.concatenate([supports[row] for row in allowed]).astype(np.int32))
            offsets = self._tensor(np.cumsum([0, *(len(supports[row]) for row in allowed)]))
            heat = settings[0][rows]
            logprob[rows], entropy[rows] = ops.sparse_linear_logprob(
                hidden_NH[rows],
                self.model.head_weight,
                token[rows],
                of_rows,
                offsets,
                torch.where(heat == 0, 1.0, heat),
            )
        return token.tolist(), logprob.tolist(), entropy.tolist(), supports

    def decode(self, works: list[Work], steps: int, adapters: Ids[Adapter | None]) -> Drawn:
        """`steps` tokens for each of works that only decode, of one adapter, without a look at the device in between."""
        assert self.loop is not None
        assert self.kv is not None  # taken again after `release_memory`
        requests = [w.request for w in works]
        return self.loop.run(requests, steps, self._adapter_rows(works, adapters), requests[0].branch.adapter)

    def _adapter_rows(self, works: list[Work], adapters: Ids[Adapter | None]) -> AdapterRows:
        """The step's tokens by the adapter of their branch."""
        chosen = [w.request.branch.adapter for w in works]
        if len(used := set(chosen)) == 1:
            only = adapters[used.pop()]
            return AdapterRows([] if only is None else [(only, None)])
        row = np.repeat(chosen, [w.n_tokens for w in works])
        found = ((adapters[i], row == i) for i in sorted(used))
        return AdapterRows(
            [(adapter, self._tensor(np.flatnonzero(rows))) for adapter, rows in found if adapter is not None]
        )

    def _hidden(
        self, token_ids: Tensor, positions: Tensor, attention: PagedAttention, last: Tensor, lora: AdapterRows
    ) -> Tensor:
        """[N, H], the rows `last` [N] of the step's T."""
        if self.layers is None or lora.parts:
            return self.model.hidden(token_ids, positions, attention, lora)[last]
        return self.layers(
            token_ids,
            last,
            *self.model.rotary_tables(positions),
            positions,
            self.kv,
            attention.slots,
            attention.block_table,
            attention.cu_seqlens,
            attention.context_lens,
        )

    def _inputs(self, works: list[Work]) -> tuple[Tensor, Tensor, PagedAttention, Tensor]:
        branches = [w.request.branch for w in works]
        start = np.array([b.n_cached for b in branches])
        n = np.array([w.n_tokens for w in works])
        ends = np.cumsum(n)
        row = np.repeat(np.arange(len(works)), n)  # [T] the request of each token
        position = np.arange(ends[-1]) - (ends - n)[row] + start[row]
        pages = page_table(branches)
        slots = (
            pages.numpy()[row, position // self.page_size].astype(np.int64) * self.page_size
            + position % self.page_size
        )
        ids: list[int] = []
        for branch, work in zip(branches, works, strict=True):
            ids += branch.token_ids[branch.n_cached : branch.n_cached + work.n_tokens]
        samples = np.array([w.samples for w in works], dtype=bool)
        groups = None
        if ends[-1] == len(works) and backend.triton(
            self.kv
        ):  # the C++ kernels see by themselves what rows share
            groups = shared_groups(
                [b.pages for b in branches], [b.n_cached for b in branches], self.page_size, len(works)
            )
        attention = PagedAttention(
            kv=self.kv,
            slots=self._tensor(slots),
            block_table=self._to_device(pages),
            cu_seqlens=self._tensor(np.concatenate(([0], ends)).astype(np.int32)),
            context_lens=self._tensor((start + n).astype(np.int32)),
            scale=self.scale,
            groups=None if groups is None else (self._tensor(groups[0]), self._tensor(groups[1])),
        )
        last = self._tensor(ends[samples] - 1)
        return self._tensor(np.array(ids)), self._tensor(position), attention, last

    def _sampling(self, works: list[Work]) -> Settings:
        """The arguments of `ops.sample` after the logits. The noise counter is the index of the token to be drawn."""
        requests = [w.request for w in works if w.samples]
        if (
            self._settings is None or requests != self._sampled
        ):  # while nobody comes or goes only the counters change
            self._sampled = requests
            a, b, c, d, e = map(self._to_device, sampling_settings(requests))
            self._settings = a, b, c, d, e
        return *self._settings, self._tensor(
            np.array([len(r.branch.token_ids) for r in requests], dtype=np.int64)
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return self._to_device(torch.from_numpy(array))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)
