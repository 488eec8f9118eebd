"""Turns a step's work into tensors and runs the model on the paged KV.

Shapes: T tokens of the step, S requests, N of them sampling, L layers, P pages, B page size, Hk key heads,
D head dim, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from functools import partial

import numpy as np
import torch
from duologue.kernels import backend, ops
from duologue.kernels.softmax import Samples, Settings
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter, AdapterRows
from duologue.rollout.engine.attention import PagedAttention, shared_groups
from duologue.rollout.engine.decode import (
    DecodedSteps,
    DecodeLoop,
    Read,
    RequestSettings,
    page_table,
    sampling_settings,
)
from duologue.rollout.engine.decode_cpu import NativeLoop
from duologue.rollout.engine.decode_gpu import DeviceLoop
from duologue.rollout.engine.kv_memory import PoolMemory
from duologue.rollout.engine.pages import CACHE_TOKENS
from duologue.rollout.engine.scheduler import Work
from duologue.rollout.engine.sequence import Request
from torch import Tensor

EXCLUDED = -1e30  # a logit of probability 0 whose products stay finite


def token_bytes(model: Decoder) -> int:
    """Of the KV of one token."""
    config = model.config
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return numbers * model.model.embed_tokens.weight.element_size()


def measured_tokens(model: Decoder, page_size: int) -> int:
    """The tokens of a pool in 85 % of the memory that is free on the model's GPU; CACHE_TOKENS on CPU.

    MemoryError when that holds no page.
    """
    device = model.model.embed_tokens.weight.device
    if device.type != "cuda":
        return CACHE_TOKENS
    torch.cuda.empty_cache()  # what torch holds and does not use counts as free
    free, total = torch.cuda.mem_get_info(device)
    tokens = int(0.85 * free) // token_bytes(model) // page_size * page_size
    if tokens < page_size:
        raise MemoryError(
            f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free on {device}, not enough for one page of "
            f"{page_size} tokens of {token_bytes(model)} bytes; use a smaller model, or set "
            "rollout.cache_tokens after freeing memory"
        )
    return tokens


def _read(samples: Samples, candidates: dict[int, list[float]]) -> DecodedSteps:
    """A step that has one draw for each row."""
    token, logprob, entropy, support_ids, offsets = samples
    return DecodedSteps(
        token.cpu().numpy()[None],
        logprob.cpu().numpy()[None],
        entropy.cpu().numpy()[None],
        np.diff(offsets.cpu().numpy())[None],
        support_ids.cpu().numpy(),
        candidate_logprobs=candidates,
    )


class Runner:
    """The model with its KV tensor. The weights are the trainer's own parameters, used in place.

    `adapters` is the engine's list: entry 0 is the model's own, None the base.
    """

    def __init__(
        self,
        model: Decoder,
        adapters: Ids[Adapter | None],
        n_pages: int,
        page_size: int,
        decode_steps: int | None,
        max_batch: int = 1,
    ) -> None:
        config = model.config
        self.model = model
        self.adapters = adapters
        self.layers = model.paged_layers()
        self.page_size = page_size
        self.device = model.model.embed_tokens.weight.device
        self._sampled: list[Request] = []
        self._settings: RequestSettings
        on_cuda = self.device.type == "cuda"
        if decode_steps is None:
            decode_steps = 8 if on_cuda or self.layers is not None else 1
        scratch = n_pages  # a page of nobody's behind the others, for rows that have stopped
        n_pages += decode_steps > 1
        self.shape = (config.num_layers, 2, n_pages, page_size, config.num_kv_heads, config.head_dim)
        self._memory = PoolMemory(self.shape, model.model.embed_tokens.weight.dtype, self.device)
        self._kv: Tensor | None = None
        self.loop: DecodeLoop | None = None
        if decode_steps > 1 and self.layers is not None:
            self.loop = NativeLoop(model, self.layers, adapters, decode_steps)
        elif decode_steps > 1:
            self.loop = DeviceLoop(model, adapters, scratch, decode_steps, on_cuda, max_batch)
        if not on_cuda:  # where it is taken by the first request, for imitation and updates come before it
            assert self.kv is not None  # what does not fit is said at once

    @property
    def kv(self) -> Tensor:
        """[L, 2, P, B, Hk, D]. MemoryError says what the pool takes."""
        if self._kv is None:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # of an update, whose blocks are not the size of a pool
            try:
                self._kv = self._memory.take()
            except RuntimeError as error:  # what torch raises when memory runs out, on every device
                tokens = self.shape[2] * self.page_size
                gib = tokens * token_bytes(self.model) / 2**30
                raise MemoryError(
                    f"the KV pool of {tokens} tokens takes {gib:.2f} GiB, which {self.device} does not have; "
                    "lower rollout.cache_tokens"
                ) from error
            if self.loop is not None:
                self.loop.use(self._kv)
        return self._kv

    def release_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps of rows that were cancelled may still run
        self._kv = None
        if self.loop is not None:
            self.loop.leave()
        self._memory.give_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_graphs(self) -> None:
        """What was captured with other adapters."""
        if self.loop is not None:
            self.loop.forget()

    def copy_page(self, source: int, target: int) -> None:
        self.kv[:, :, target].copy_(self.kv[:, :, source])

    @torch.no_grad()
    def execute(self, works: list[Work], allowed: dict[int, Ids[int]]) -> Read:
        """Launch one step: all works' KV, and a draw for those that sample; `allowed` restricts some rows.

        What a loop drew ahead for them is forfeited.
        """
        for work in works:
            work.request.ahead = 0
        token_ids, positions, attention, last = self._inputs(works)
        hidden_NH = self._hidden(token_ids, positions, attention, last, self._adapter_rows(works))
        if len(last) == 0:
            nothing = np.zeros((1, 0))
            return lambda: DecodedSteps(nothing, nothing, nothing, nothing, nothing[0])
        settings = self._sampling(works)
        if allowed:
            samples = self._restricted(hidden_NH, settings, allowed)
        else:
            samples = ops.linear_sample(hidden_NH, self.model.head_weight, *settings, exact=self.model.exact)
        candidates = self._candidates(hidden_NH, [w.request for w in works if w.samples])
        return partial(_read, samples, candidates)

    def _candidates(self, hidden_NH: Tensor, requests: list[Request]) -> dict[int, list[float]]:
        """The log-probs of the ids that rows ask for, as training takes them, to the bit."""
        asked = {row: r.candidates for row, r in enumerate(requests) if r.candidates}
        if not asked:
            return {}
        sizes = [len(ids) for ids in asked.values()]
        rows = self._tensor(np.array(list(asked)))
        logits = self.model.head(hidden_NH[rows])[self._tensor(np.repeat(np.arange(len(asked)), sizes))]
        targets = self._tensor(np.array([token for ids in asked.values() for token in ids]))
        logprobs, _ = ops.logprob(logits, targets)
        return dict(zip(asked, map(Tensor.tolist, torch.split(logprobs, sizes)), strict=True))

    def _restricted(self, hidden_NH: Tensor, settings: Settings, allowed: dict[int, Ids[int]]) -> Samples:
        """As `ops.linear_sample`, where the rows that `allowed` names draw from its ids alone.

        Such a row's support is the allowed ids, or those of them that truncation left. Its log-prob and
        entropy are taken over these as training will do it, to the bit.
        """
        logits_NV = self.model.head(hidden_NH)
        rows = self._tensor(np.array(list(allowed)))
        at = torch.repeat_interleave(rows, self._tensor(np.array([len(ids) for ids in allowed.values()])))
        ids = self._tensor(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in allowed.values()]))
        among = logits_NV[at, ids]
        logits_NV[rows] = EXCLUDED
        logits_NV[at, ids] = among
        token, logprob, entropy, support_ids, offsets = ops.sample(logits_NV, *settings)
        supports = np.split(support_ids.cpu().numpy(), offsets[1:-1].tolist())
        for row, some in allowed.items():
            drawable = np.unique(np.array(some, dtype=np.int32))
            supports[row] = np.intersect1d(drawable, supports[row]) if len(supports[row]) else drawable
        temperature = settings[0][rows]
        logprob[rows], entropy[rows] = ops.sparse_linear_logprob(
            hidden_NH[rows],
            self.model.head_weight,
            token[rows],
            *self._joined([supports[row] for row in allowed]),
            torch.where(temperature == 0, 1.0, temperature),
        )
        return token, logprob, entropy, *self._joined(supports)

    def _joined(self, supports: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The ids of some supports, int32, and the offsets [n + 1] where each begins and ends."""
        offsets = np.cumsum([0, *map(len, supports)])
        return self._tensor(np.concatenate(supports)), self._tensor(offsets)

    def decode(self, works: list[Work], steps: int) -> Read:
        """Launch `steps` for works that the loop takes, with one host sync at the end."""
        assert self.loop is not None
        assert self.kv is not None  # taken again after `release_memory`
        return self.loop.run([w.request for w in works], steps)

    def _adapter_rows(self, works: list[Work]) -> AdapterRows:
        """The step's tokens by the adapter of their branch."""
        chosen = [w.request.branch.adapter for w in works]
        if len(set(chosen)) == 1:
            adapter = self.adapters[chosen[0]]
            return AdapterRows([] if adapter is None else [(adapter, None)])
        of_token = np.repeat(chosen, [w.n_tokens for w in works])
        parts = [(self.adapters[i], np.flatnonzero(of_token == i)) for i in sorted(set(chosen))]
        return AdapterRows([(adapter, self._tensor(rows)) for adapter, rows in parts if adapter is not None])

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
        page = pages[row, position // self.page_size].astype(np.int64)
        slots = page * self.page_size + position % self.page_size
        ids: list[int] = []
        for branch, work in zip(branches, works, strict=True):
            ids += branch.token_ids[branch.n_cached : branch.n_cached + work.n_tokens]
        samples = np.array([w.samples for w in works], dtype=bool)
        groups = None
        decodes_only = ends[-1] == len(works)
        if decodes_only and backend.triton(self.kv):  # the C++ kernels see by themselves what rows share
            groups = shared_groups(pages, start, self.page_size, len(works))
        attention = PagedAttention(
            kv=self.kv,
            slots=self._tensor(slots),
            block_table=self._tensor(pages),
            cu_seqlens=self._tensor(np.concatenate(([0], ends)).astype(np.int32)),
            context_lens=self._tensor((start + n).astype(np.int32)),
            scale=self.model.scale,
            groups=None if groups is None else (self._tensor(groups[0]), self._tensor(groups[1])),
        )
        last = self._tensor(ends[samples] - 1)
        return self._tensor(np.array(ids)), self._tensor(position), attention, last

    def _sampling(self, works: list[Work]) -> Settings:
        """The arguments of `ops.sample` after the logits; position is the index of the token to draw."""
        requests = [w.request for w in works if w.samples]
        if requests != self._sampled:  # else only the counters change
            self._sampled = requests
            a, b, c, d, e = map(self._to_device, sampling_settings(requests))
            self._settings = a, b, c, d, e
        position = np.array([len(r.branch) for r in requests], dtype=np.int64)
        return *self._settings, self._tensor(position)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return self._to_device(torch.from_numpy(array))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)
