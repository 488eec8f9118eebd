"""Decoding without a look of the host: several steps of the whole batch in one go.

On CPU `NativeLoop` is one call of the C++ kernels, which ends early when a row stops. On CUDA `DecodeLoop` has all state on the
device: each step reads and writes buffers of fixed size, the token of every row, its position, block table, sampling parameters and
whether it has stopped. So a step is the same launches every time, captured once per batch size and replayed as a graph, with the
sampler in it. Pages for all steps are reserved before; a row that stops early goes on writing to a page that nobody reads.

Shapes: B rows of the bucket, n requests in them, k steps, W pages of a row, S stop tokens, M kept ids.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from duologue.kernels import backend, ops
from duologue.kernels.paged_decoder import PagedDecoder
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter, AdapterRows
from duologue.rollout.engine.attention import PagedAttention, shared_groups
from duologue.rollout.engine.sequence import Branch, Request
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
KEPT = 512  # ids of a truncated draw that a step has room for; with more the host draws that token itself
STOPS = 16


@dataclass(slots=True)
class Drawn:
    """What `k` steps gave, on the host. Row i is request i's; after its last valid step a row's values mean nothing."""

    tokens: np.ndarray  # [k, n] int64
    logprobs: np.ndarray  # [k, n] fp32
    entropies: np.ndarray  # [k, n] fp32
    n_kept: np.ndarray  # [k, n] int64: 0 for all tokens, -1 where there was no room for them
    kept: array[int]  # their ids, one after the other
    waited: float = 0.0  # seconds that the host waited for the device
    _ends: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._ends = np.maximum(self.n_kept, 0).cumsum().reshape(self.n_kept.shape)

    def overflows(self, step: int, row: int) -> bool:
        return bool(self.n_kept[step, row] < 0)

    def support(self, step: int, row: int) -> array[int]:
        end = int(self._ends[step, row])
        return self.kept[end - int(self.n_kept[step, row]) : end]


def page_table(branches: Sequence[Branch]) -> Tensor:
    """[S, max_pages] int32, 0 behind a branch's last page."""
    table = np.zeros((len(branches), max(len(b.pages) for b in branches)), dtype=np.int32)
    for i, branch in enumerate(branches):
        table[i, : len(branch.pages)] = branch.pages
    return torch.from_numpy(table)


def sampling_settings(requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Temperature, top_k, top_p, min_p and seed of each, [N], as `ops.sample` takes them."""
    given = [r.params for r in requests]
    floats = (
        torch.tensor([getattr(p, x) for p in given], dtype=torch.float32)
        for x in ("temperature", "top_p", "min_p")
    )
    temperature, top_p, min_p = floats
    top_k, seed = (
        torch.tensor([p.top_k for p in given], dtype=torch.int32),
        torch.tensor([r.seed for r in requests], dtype=torch.int64),
    )
    return temperature, top_k, top_p, min_p, seed


class NativeLoop:
    """`run` draws up to `steps` tokens for each of some requests that have one token to compute each, in one call."""

    def __init__(self, model: Decoder, layers: PagedDecoder, steps: int) -> None:
        self.model, self.layers, self.steps = model, layers, steps
        self.kv: Tensor | None = None

    def use(self, kv: Tensor) -> None:
        self.kv = kv

    def forget(self) -> None:
        """There is nothing that knows of adapters."""

    def takes(self, requests: Sequence[Request], adapter: Adapter | None) -> bool:
        return adapter is None and all(r.params.allow is None and not r.params.stop_strings for r in requests)

    def reach(self, left: Sequence[int]) -> int:
        """Steps worth taking when the requests may draw so many tokens each: until the first one ends."""
        return min(self.steps, *left)

    def run(self, requests: Sequence[Request], steps: int, _lora: AdapterRows, _adapter: int) -> Drawn:
        assert self.kv is not None
        branches = [r.branch for r in requests]
        position = torch.tensor([b.n_cached + 1 for b in branches])
        settings = *sampling_settings(requests), position
        last = torch.tensor([b.token_ids[-1] for b in branches])
        tables = self.model.rotary_tables(position + (steps - 2))
        stops = [r.stop_token_ids for r in requests]
        drawn = self.layers.decode(
            self.model.head_weight, settings, last, *tables, self.kv, page_table(branches), stops, steps
        )
        tokens, logprobs, entropies, n_kept, kept = (x.numpy() for x in drawn)
        return Drawn(tokens, logprobs, entropies, n_kept, array("i", kept.tobytes()))


@dataclass(slots=True)
class _Bucket:
    """The buffers of B rows; `step` replays or runs one step on them."""

    ints: dict[str, Tensor]  # [B] int64: token, position, last, seed
    floats: dict[str, Tensor]  # [B] fp32: temperature, top_p, min_p
    top_k: Tensor  # [B] int32
    stops: Tensor  # [B, S] int64, -1 for none
    done: Tensor  # [B] bool
    table: Tensor  # [B, W] int32
    groups: tuple[Tensor, Tensor] | None  # [B + 1] and [B] int32, where rows share what they begin with
    cu_seqlens: Tensor  # [B + 1] int32
    turn: Tensor  # [1] int64: the step's number
    out: dict[str, Tensor] = field(
        default_factory=dict
    )  # [k, B]: token, logprob, entropy, n_kept; kept [k, B, M]
    step: Callable[[], None] | None = None


class DecodeLoop:
    """`run` draws up to `steps` tokens for each of some requests that have one token to compute each.

    Page `scratch` of the KV [L, 2, P, B, Hk, D] is nobody's. `capture`: hold a step in a CUDA graph; without it the same code runs
    launch by launch, on any device.
    """

    def __init__(self, model: Decoder, scratch: int, steps: int, capture: bool) -> None:
        self.model, self.scratch, self.steps, self.capture = model, scratch, steps, capture
        self.device, self.page_size = model.head_weight.device, 0
        self.kv: Tensor | None = None
        self._address = 0
        self._buckets: dict[tuple[int, int, bool, int, bool], _Bucket] = {}
        self._memory: Any = None  # one pool for all graphs: they never run at the same time

    def use(self, kv: Tensor) -> None:
        """Work on this memory. Graphs know addresses: they stay good only where it came back to the same place."""
        if kv.data_ptr() != self._address:
            self.forget()
        self.kv, self._address, self.page_size = kv, kv.data_ptr(), kv.shape[3]

    def forget(self) -> None:
        self._buckets.clear()

    def takes(self, requests: Sequence[Request], _adapter: Adapter | None) -> bool:
        """Whether these can be drawn without a look in between."""
        return len(requests) <= BUCKETS[-1] and all(
            r.params.allow is None
            and not r.params.stop_strings
            and not r.plain
            and len(r.stop_token_ids) <= STOPS
            for r in requests
        )

    def reach(self, left: Sequence[int]) -> int:
        """Steps worth taking: until the last one ends, for a row that has stopped costs nothing more."""
        return min(self.steps, max(left))

    @torch.no_grad()
    def run(self, requests: Sequence[Request], steps: int, lora: AdapterRows, adapter: int) -> Drawn:
        """`steps` (at most `self.steps`) for requests whose pages reach as far; all go through one adapter."""
        n, truncated = (
            len(requests),
            any(r.params.top_k or r.params.top_p < 1 or r.params.min_p for r in requests),
        )
        size = next(b for b in BUCKETS if b >= n)
        width = max(len(r.branch.pages) for r in requests)
        width = next(w for w in (16, 64, 256, 1024, 4096, 1 << 20) if w >= width)
        width = min(width, -(-self.model.config.max_position_embeddings // self.page_size) + 1)
        branches, groups = [r.branch for r in requests], None
        if self.kv is not None and backend.triton(
            self.kv
        ):  # the C++ kernels see by themselves what rows share
            groups = shared_groups(
                [b.pages for b in branches], [b.n_cached for b in branches], self.page_size, size
            )
        bucket = self._bucket(size, width, truncated, adapter, groups is not None, lora)
        self._fill(bucket, requests)
        if bucket.groups is not None and groups is not None:
            for target, source in zip(bucket.groups, groups, strict=True):
                target.copy_(torch.from_numpy(source))
        assert bucket.step is not None
        for _ in range(steps):
            bucket.step()
        ints = torch.stack((bucket.out["token"][:steps, :n], bucket.out["n_kept"][:steps, :n]))
        floats = torch.stack((bucket.out["logprob"][:steps, :n], bucket.out["entropy"][:steps, :n]))
        began = time.perf_counter()
        tokens, n_kept = ints.cpu().numpy()
        waited = time.perf_counter() - began
        logprobs, entropies = floats.cpu().numpy()
        n_kept = np.where(n_kept > KEPT, -1, n_kept)
        kept = array("i")
        if n_kept.any():
            room = bucket.out["kept"][:steps, :n].cpu().numpy()
            kept = array("i", room[np.arange(room.shape[2]) < n_kept[..., None]].tobytes())
        return Drawn(tokens, logprobs, entropies, n_kept, kept, waited)

    def _bucket(
        self, B: int, W: int, truncated: bool, adapter: int, grouped: bool, lora: AdapterRows
    ) -> _Bucket:
        key = B, W, truncated, adapter, grouped
        if key in self._buckets:
            return self._buckets[key]

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=self.device)

        k, most = self.steps, KEPT if truncated else 1
        bucket = _Bucket(
            ints={name: ints(B) for name in ("token", "position", "last", "seed")},
            floats={name: floats(B) for name in ("temperature", "top_p", "min_p")},
            top_k=ints(B).int(),
            stops=ints(B, STOPS),
            done=ints(B).bool(),
            table=ints(B, W).int(),
            turn=ints(1),
            groups=(torch.arange(B + 1, dtype=torch.int32, device=self.device), ints(B).int())
            if grouped
            else None,
            cu_seqlens=torch.arange(B + 1, dtype=torch.int32, device=self.device),
            out={
                "token": ints(k, B),
                "n_kept": ints(k, B),
                "logprob": floats(k, B),
                "entropy": floats(k, B),
                "kept": ints(k, B, most).int(),
            },
        )
        self._buckets[key] = bucket
        eager = self._step_of(bucket, truncated, lora)
        bucket.step = self._captured(bucket, eager) if self.capture else eager
        return bucket

    def _captured(self, bucket: _Bucket, step: Callable[[], None]) -> Callable[[], None]:
        """The step as a graph. It is run before on a stream of its own, as capture asks for, with every row stopped."""
        bucket.done.fill_(True)
        bucket.table.fill_(self.scratch)
        limit = self.model.config.max_position_embeddings
        self.model.rotary_tables(
            torch.tensor([limit - 1], device=self.device)
        )  # whole, so that no step makes them
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            step()
        self._memory = self._memory or graph.pool()
        return graph.replay

    def _fill(self, bucket: _Bucket, requests: Sequence[Request]) -> None:
        """The requests' state into the first rows; the others are stopped from the start."""
        (B, W), n = bucket.table.shape, len(requests)
        table = np.full((B, W), self.scratch, dtype=np.int32)
        ints = {name: np.zeros(B, dtype=np.int64) for name in bucket.ints}
        floats = {name: np.ones(B, dtype=np.float32) for name in bucket.floats}
        top_k, stops = np.zeros(B, dtype=np.int32), np.full((B, STOPS), -1, dtype=np.int64)
        floats["min_p"][:] = 0
        for i, request in enumerate(requests):
            branch, params = request.branch, request.params
            table[i, : len(branch.pages)] = branch.pages
            ints["token"][i], ints["position"][i], ints["seed"][i] = (
                branch.token_ids[-1],
                branch.n_cached,
                request.seed,
            )
            ints["last"][i] = branch.n_cached + params.max_new_tokens - len(request.completion.token_ids) - 1
            floats["temperature"][i], floats["top_p"][i], floats["min_p"][i] = (
                params.temperature,
                params.top_p,
                params.min_p,
            )
            top_k[i] = params.top_k
            stops[i, : len(request.stop_token_ids)] = sorted(request.stop_token_ids)
        for target, source in (
            (bucket.table, table),
            (bucket.top_k, top_k),
            (bucket.stops, stops),
            (bucket.done, np.arange(B) >= n),
            *((bucket.ints[name], x) for name, x in ints.items()),
            *((bucket.floats[name], x) for name, x in floats.items()),
        ):
            target.copy_(torch.from_numpy(source))
        bucket.turn.zero_()

    def _step_of(self, bucket: _Bucket, truncated: bool, lora: AdapterRows) -> Callable[[], None]:
        model, size, scratch = self.model, self.page_size, self.scratch * self.page_size
        token, position, last, seed = (bucket.ints[name] for name in ("token", "position", "last", "seed"))
        temperature, top_p, min_p = (bucket.floats[name] for name in ("temperature", "top_p", "min_p"))
        done, most = bucket.done, bucket.out["kept"].shape[2]

        def step() -> None:
            assert self.kv is not None
            at = torch.where(done, 0, position)
            page = bucket.table.gather(1, (at // size).unsqueeze(1)).squeeze(1).long()
            attention = PagedAttention(
                kv=self.kv,
                slots=torch.where(done, scratch, page * size + at % size),
                block_table=bucket.table,
                cu_seqlens=bucket.cu_seqlens,
                context_lens=(at + 1).int(),
                scale=model.scale,
                groups=bucket.groups,
            )
            hidden = model.hidden(token, position, attention, lora)
            settings = (temperature, bucket.top_k, top_p, min_p, seed, position + 1)
            drawn: tuple[Tensor, ...]
            if truncated:
                drawn = ops.sample_bounded(model.head(hidden), *settings, most)
            else:
                drawn = ops.linear_sample(
                    hidden, model.head_weight, *settings, exact=model.exact, whole=True
                )[:3]
            for name, value in zip(("token", "logprob", "entropy", "kept", "n_kept"), drawn, strict=False):
                bucket.out[name].index_copy_(0, bucket.turn, value.to(bucket.out[name].dtype).unsqueeze(0))
            bucket.turn.add_(1)
            token.copy_(torch.where(done, token, drawn[0]))
            position.add_((~done).long())
            done.logical_or_((token.unsqueeze(1) == bucket.stops).any(1) | (position > last))

        return step
