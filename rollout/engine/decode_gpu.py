"""Decoding k steps with all state on the device, so that the host reads once per k steps.

Each step reads and writes buffers of fixed size: the token of every row, its position, block table, sampling
parameters and whether it has stopped. So a step is the same launches every time, captured once per batch size
and replayed as a CUDA graph, with the sampler in it. Pages for all steps are reserved before; a row that
stops early goes on writing to a page that nobody reads.

Shapes: B rows of the bucket, n requests in them, k steps, W pages of a row, S stop tokens, M support ids.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from duologue.kernels import backend, ops
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter, AdapterRows
from duologue.rollout.engine.attention import PagedAttention, shared_groups
from duologue.rollout.engine.decode import DecodedSteps, DecodeLoop, page_table, sampling_settings
from duologue.rollout.engine.sequence import Request
from torch import Tensor
from torch.nn.functional import pad

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows
WIDTHS = (16, 64, 256, 1024, 4096, 1 << 20)  # pages of a row
SUPPORT_IDS = 512  # of a truncated draw that a step holds; with more a plain step draws that token again
STOPS = 16
UNUSED = (1.0, 0, 1.0, 0.0, 0)  # settings of a row without a request


class _Rows(NamedTuple):
    """What a step knows of each of B rows, of which those without a request have stopped."""

    token: Tensor  # [B]
    position: Tensor  # [B]
    last: Tensor  # [B] the position of the last token to draw
    done: Tensor  # [B] bool
    stops: Tensor  # [B, S] -1 for none
    table: Tensor  # [B, W] int32
    temperature: Tensor  # [B], as the others of `sampling_settings`
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def _rows(requests: Sequence[Request], B: int, W: int, scratch: int) -> _Rows:
    """On the host."""
    branches = [r.branch for r in requests]
    below = (0, B - len(requests))
    stops = torch.full((B, STOPS), -1)
    for i, request in enumerate(requests):
        stops[i, : len(request.stop_token_ids)] = torch.tensor(sorted(request.stop_token_ids))
    table = page_table(branches)
    return _Rows(
        pad(torch.tensor([b.token_ids[-1] for b in branches]), below),
        pad(torch.tensor([b.n_cached for b in branches]), below),
        pad(torch.tensor([r.branch.n_cached + r.n_left - 1 for r in requests]), below),
        torch.arange(B) >= len(requests),
        stops,
        pad(table, (0, W - table.shape[1], *below), value=scratch),
        *(
            pad(values, below, value=unused)
            for values, unused in zip(sampling_settings(requests), UNUSED, strict=True)
        ),
    )


class _Bucket:
    """Buffers on a device, made like `rows`; `step` replays or runs one step on them."""

    def __init__(self, rows: _Rows, k: int, truncated: bool, grouped: bool, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        f32, i32 = torch.float32, torch.int32
        B = len(rows.token)
        self.support_limit = SUPPORT_IDS if truncated else 1
        # Zeros, for a graph's warm-up runs before they are filled, and reads the embedding of `token`.
        self.rows = _Rows(*(torch.zeros_like(x, device=device) for x in rows))
        self.cu_seqlens = torch.arange(B + 1, dtype=i32, device=device)
        self.groups = (self.cu_seqlens.clone(), zeros(B, dtype=i32)) if grouped else None
        self.step_index = zeros(1)
        self.out = {  # in the order of what `ops.sample_bounded` returns
            "token": zeros(k, B),
            "logprob": zeros(k, B, dtype=f32),
            "entropy": zeros(k, B, dtype=f32),
            "support_ids": zeros(k, B, self.support_limit, dtype=i32),
            "support_size": zeros(k, B),
        }
        self.step: Callable[[], None]


class DeviceLoop(DecodeLoop):
    """Page `scratch` of the KV is nobody's. `capture`: hold a step in a CUDA graph.

    Without it the same code runs launch by launch, on any device.
    """

    def __init__(
        self, model: Decoder, adapters: Sequence[Adapter | None], scratch: int, steps: int, capture: bool
    ) -> None:
        super().__init__(model, adapters, steps)
        self.scratch = scratch
        self.capture = capture
        self.device = model.head_weight.device
        self.page_size = 0
        self._address = 0
        self._buckets: dict[tuple[torch.Size, bool, int, bool], _Bucket] = {}
        self._memory: Any = None  # one pool for all graphs: they never run at the same time
        # Of warm-up and capture both. On another stream than its warm-up's, a capture takes cuBLAS' workspace
        # anew, inside the pool, and pins it there after the last graph is gone. On a stream of two loops, the
        # end of one frees the workspace under the graphs of the other.
        self._stream: Any = None

    def use(self, kv: Tensor) -> None:
        """Graphs know addresses: they stay good only where the memory came back to the same place."""
        if kv.data_ptr() != self._address:
            self.forget()
        super().use(kv)
        self._address = kv.data_ptr()
        self.page_size = kv.shape[3]

    def forget(self) -> None:
        """The pool goes with its graphs: a dead one may not be captured into."""
        self._buckets.clear()
        self._memory = None

    def takes(self, requests: Sequence[Request]) -> bool:
        return (
            super().takes(requests)
            and len(requests) <= BUCKETS[-1]
            and not any(r.plain or len(r.stop_token_ids) > STOPS for r in requests)
        )

    def reach(self, left: Sequence[int]) -> int:
        """Until the last one ends, for a row that has stopped costs nothing more."""
        return min(self.steps, max(left))

    @torch.no_grad()
    def run(self, requests: Sequence[Request], steps: int) -> DecodedSteps:
        bucket = self._filled(requests)
        for _ in range(steps):
            bucket.step()
        n = len(requests)
        out = {name: buffer[:steps, :n] for name, buffer in bucket.out.items()}
        ints = torch.stack((out["token"], out["support_size"]))
        floats = torch.stack((out["logprob"], out["entropy"]))
        began = time.perf_counter()
        tokens, support_sizes = ints.cpu().numpy()
        seconds = time.perf_counter() - began
        logprobs, entropies = floats.tolist()
        support_sizes = np.where(support_sizes > bucket.support_limit, -1, support_sizes)
        support_ids = array("i")
        if support_sizes.any():
            ids = out["support_ids"].cpu().numpy()
            valid = np.arange(ids.shape[2]) < support_sizes[..., None]
            support_ids = array("i", ids[valid].tobytes())
        return DecodedSteps(tokens.tolist(), logprobs, entropies, support_sizes, support_ids, seconds)

    # ---- buffers -----------------------------------------------------------------------------------------

    def _filled(self, requests: Sequence[Request]) -> _Bucket:
        """The bucket for these requests, with their state in its first rows; the others are stopped."""
        assert self.kv is not None
        branches = [r.branch for r in requests]
        size = next(b for b in BUCKETS if b >= len(requests))
        groups = None
        if backend.triton(self.kv):  # the C++ kernels see by themselves what rows share
            pages, cached = [b.pages for b in branches], [b.n_cached for b in branches]
            groups = shared_groups(pages, cached, self.page_size, size)
        width = next(w for w in WIDTHS if w >= max(len(b.pages) for b in branches))
        width = min(width, -(-self.model.config.max_position_embeddings // self.page_size) + 1)
        truncated = any(r.params.truncates for r in requests)
        rows = _rows(requests, size, width, self.scratch)
        bucket = self._bucket(rows, truncated, branches[0].adapter, groups is not None)
        for buffer, values in zip(bucket.rows, rows, strict=True):
            buffer.copy_(values)
        if bucket.groups is not None and groups is not None:
            for buffer, values in zip(bucket.groups, map(torch.from_numpy, groups), strict=True):
                buffer.copy_(values)
        bucket.step_index.zero_()
        return bucket

    def _bucket(self, rows: _Rows, truncated: bool, adapter: int, grouped: bool) -> _Bucket:
        key = rows.table.shape, truncated, adapter, grouped
        if key not in self._buckets:
            bucket = _Bucket(rows, self.steps, truncated, grouped, self.device)
            lora = self.adapters[adapter]
            step = self._step_of(bucket, truncated, AdapterRows([] if lora is None else [(lora, None)]))
            bucket.step = self._captured(bucket, step) if self.capture else step
            self._buckets[key] = bucket
        return self._buckets[key]

    # ---- one step ----------------------------------------------------------------------------------------

    def _step_of(self, bucket: _Bucket, truncated: bool, lora: AdapterRows) -> Callable[[], None]:
        model, size = self.model, self.page_size

        def step() -> None:
            assert self.kv is not None
            token, position, last, done, stops, table = bucket.rows[:6]
            at = torch.where(done, 0, position)
            page = table.gather(1, (at // size).unsqueeze(1)).squeeze(1).long()
            attention = PagedAttention(
                kv=self.kv,
                slots=torch.where(done, self.scratch * size, page * size + at % size),
                block_table=table,
                cu_seqlens=bucket.cu_seqlens,
                context_lens=(at + 1).int(),
                scale=model.scale,
                groups=bucket.groups,
            )
            hidden = model.hidden(token, position, attention, lora)
            settings = (*bucket.rows[6:], position + 1)
            drawn: tuple[Tensor, ...]
            if truncated:
                drawn = ops.sample_bounded(model.head(hidden), *settings, bucket.support_limit)
            else:
                drawn = ops.linear_sample(
                    hidden, model.head_weight, *settings, exact=model.exact, whole=True
                )[:3]
            for buffer, value in zip(bucket.out.values(), drawn, strict=False):
                buffer.index_copy_(0, bucket.step_index, value.to(buffer.dtype).unsqueeze(0))
            bucket.step_index.add_(1)
            token.copy_(torch.where(done, token, drawn[0]))
            position.add_((~done).long())
            done.logical_or_((token.unsqueeze(1) == stops).any(1) | (position > last))

        return step

    def _captured(self, bucket: _Bucket, step: Callable[[], None]) -> Callable[[], None]:
        """The step as a graph. It runs before on the stream of the capture, all rows stopped."""
        bucket.rows.done.fill_(True)
        bucket.rows.table.fill_(self.scratch)
        limit = self.model.config.max_position_embeddings
        self.model.rotary_tables(torch.tensor([limit - 1], device=self.device))  # whole: no step makes them
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
            step()
        self._memory = self._memory or graph.pool()
        return graph.replay
