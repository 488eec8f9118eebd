"""Decoding k steps with all state on the device, so that the host reads once per k steps, and late.

Each step reads and writes buffers of fixed size: the token of every row, its position, block table and
sampling parameters. So a step is the same launches every time, captured once per batch size and replayed as a
CUDA graph, with the sampler in it. Pages for all steps are reserved before; a row that stops early goes on
writing to a page that nobody reads.

The last steps of a call are not waited for: while the device takes them the host enters what the others drew,
plans and launches the next call, whose rows go on from where the device has them.

    host      launch 8, wait for 6      | enter 6, plan, launch 8, wait for 2 + 6  | enter 8, plan, ...
    device     1 2 3 4 5 6 (to the host)  7 8             1 2 3 4 5 6 (to the host)  7 8

A row that ends, or is to be taken by a plain step, forfeits what was drawn for it and not entered: any draw
follows from the request's seed and the position, so it is the same again.

Shapes: B rows of the bucket, n requests in them, k steps, W pages of a row.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from duologue.kernels import backend, ops
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter, AdapterRows
from duologue.rollout.engine.attention import PagedAttention, shared_groups
from duologue.rollout.engine.buckets import (
    STOPPED,
    STOPS,
    Arrays,
    Bucket,
    Reading,
    Rows,
    settings_arrays,
    widened,
)
from duologue.rollout.engine.decode import DecodeLoop, Read, page_table
from duologue.rollout.engine.scheduler import Work
from duologue.rollout.engine.sequence import Request
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows
WIDTHS = (16, 64, 256, 1024, 4096, 1 << 20)  # pages of a row
HELD = 2  # steps that run while the host works: two take a GPU longer than the host takes for eight


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """An engine that Python happens to collect gives memory back, which would end a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(slots=True)
class _Flight:
    """Steps that the device takes, or has taken, while the host enters what was drawn before."""

    rows: dict[Request, int]
    steps: int
    reading: Reading
    state: Tensor  # [2, B] of its bucket


class DeviceLoop(DecodeLoop):
    """Page `scratch` of the KV is nobody's. `capture`: hold a step in a CUDA graph, of `most` rows first.

    Without it the same code runs launch by launch, on any device.
    """

    def __init__(
        self,
        model: Decoder,
        adapters: Sequence[Adapter | None],
        scratch: int,
        steps: int,
        capture: bool,
        most: int = 1,
    ) -> None:
        super().__init__(model, adapters, steps)
        self.largest = next(b for b in BUCKETS if b >= min(most, BUCKETS[-1]))
        self.scratch = scratch
        self.capture = capture
        self.held = HELD if capture else 0  # without a device of its own nothing runs beside the host
        self._flights: dict[int, _Flight] = {}  # by adapter
        self.device = model.head_weight.device
        self.page_size = 0
        self._address = 0
        self._buckets: dict[tuple[tuple[int, ...], bool, int, bool], Bucket] = {}
        self._known: list[Request] = []  # of the last call, whose settings are in `_settings`
        self._settings: Arrays = {}
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

    def leave(self) -> None:
        super().leave()
        self._flights.clear()

    def forget(self) -> None:
        """The pool goes with its graphs: a dead one may not be captured into."""
        for flight in self._flights.values():
            flight.reading.wait()
        self._flights.clear()
        self._buckets.clear()
        self._memory = None

    def takes(self, requests: Sequence[Request]) -> bool:
        return (
            super().takes(requests)
            and len(requests) <= BUCKETS[-1]
            and max([len(r.stop_token_ids) for r in requests]) <= STOPS
        )

    def parts(self, works: list[Work]) -> list[list[Work]]:
        """Rows that decode keep their graph, one for each adapter, beside the prefill of others and what is
        beyond a graph's rows.
        """
        ahead: dict[int, list[Work]] = {}
        others: list[Work] = []
        for work in works:
            request = work.request
            decodes = work.samples and work.n_tokens == 1 and not (request.plain or request.guided)
            if decodes and len(request.stop_token_ids) <= STOPS:
                part = ahead.setdefault(request.branch.adapter, [])
                (part if len(part) < BUCKETS[-1] else others).append(work)
            else:
                others.append(work)
        parts = [part for part in (others, *ahead.values()) if part]
        return parts if self.capture and ahead else [works]

    def reach(self, left: Sequence[int]) -> int:
        """Until the last one ends, for a row that has stopped costs nothing more."""
        return max(0, min(self.steps, max(left)))

    @torch.no_grad()
    def run(self, requests: Sequence[Request], steps: int) -> Read:
        before = self._flights.pop(requests[0].branch.adapter, None)
        source = np.full(len(requests), -1)
        if before is not None:
            source[:] = [before.rows[r] if r.ahead else -1 for r in requests]
            for request in before.rows:
                request.ahead = 0
        goes_on = source >= 0
        if before is None or not goes_on.any():
            return self._launch(requests, steps, source, None, np.zeros_like(source))
        earlier = partial(before.reading.decoded, np.maximum(source, 0), goes_on)
        if steps == 0:
            return earlier
        drawn = goes_on * before.steps
        first = before.steps - drawn
        later = self._launch(requests, steps, source, before.state, drawn)
        return lambda: earlier().then(later(), first)

    def _launch(
        self,
        requests: Sequence[Request],
        steps: int,
        source: np.ndarray,
        state: Tensor | None,
        drawn: np.ndarray,
    ) -> Read:
        """Steps that go on from the rows `source` [n] of a bucket's `state`, where `drawn` [n] are unread."""
        bucket = self._filled(requests, source, state)
        left = np.array([r.n_left for r in requests]) - drawn
        read = steps if left.max() <= steps else max(1, steps - self.held)
        for _ in range(read):
            bucket.step()
        reading = bucket.send(0, read)
        if read < steps:
            for _ in range(read, steps):
                bucket.step()
            rows = {request: row for row, request in enumerate(requests)}
            flight = _Flight(rows, steps - read, bucket.send(read, steps), bucket.rows.state)
            self._flights[requests[0].branch.adapter] = flight
            for request in requests:
                request.ahead = steps - read
        return partial(reading.decoded, slice(len(requests)))

    # ---- buffers -----------------------------------------------------------------------------------------

    def _filled(
        self, requests: Sequence[Request], source: np.ndarray | None = None, state: Tensor | None = None
    ) -> Bucket:
        """The bucket for these requests, with their state in its first rows; the others have stopped."""
        branches = [r.branch for r in requests]
        size = next(b for b in BUCKETS if b >= len(requests))
        width = next(w for w in WIDTHS if w >= max(len(b.pages) for b in branches))
        width = min(width, -(-self.model.config.max_position_embeddings // self.page_size) + 1)
        arrays = self._arrays(requests, size, width)
        if source is not None:
            arrays["source"][: len(source)] = np.maximum(source, 0)
            arrays["goes_on"][: len(source)] = source >= 0
        truncated = any(r.params.truncates for r in requests)
        bucket = self._bucket(arrays, truncated, branches[0].adapter)
        bucket.fill(arrays, state)
        return bucket

    def _arrays(self, requests: Sequence[Request], B: int, W: int) -> Arrays:
        """The state of the requests as `Rows` has it, none of which goes on from a bucket before."""
        if list(requests) != self._known or len(self._settings["stops"]) != B:
            self._known, self._settings = list(requests), settings_arrays(requests, B)
        branches = [r.branch for r in requests]
        n = len(requests)
        state, last = np.ones((2, B), np.int64), np.zeros(B, np.int64)
        state[0, :n] = [b.token_ids[-1] for b in branches]
        state[1, :n] = cached = np.array([b.n_cached for b in branches])
        last[:n] = cached - 1 + [r.n_left for r in requests]
        by_name = {
            **self._settings,
            "state": state,
            "source": np.zeros(B, np.int64),
            "goes_on": np.zeros(B, bool),
            "last": last,
            "table": page_table(branches, W, B, self.scratch),
            "step_index": np.zeros(1, np.int64),
        }
        arrays = {name: by_name[name] for name in Rows._fields if name in by_name}
        assert self.kv is not None
        if backend.triton(self.kv):  # the C++ kernels see by themselves what rows share
            groups = shared_groups(by_name["table"][:n], cached, self.page_size, B)
            arrays |= {} if groups is None else {"starts": groups[0], "shared": groups[1]}
        return arrays

    def _bucket(self, arrays: Arrays, truncated: bool, adapter: int) -> Bucket:
        key = arrays["table"].shape, truncated, adapter, "starts" in arrays
        if key not in self._buckets:
            if self.capture and len(arrays["last"]) < self.largest:  # what its graph takes serves all smaller
                self._bucket(widened(arrays, self.largest), truncated, adapter)
            bucket = Bucket(arrays, self.steps, truncated, self.device)
            lora = self.adapters[adapter]
            step = self._step_of(bucket, truncated, AdapterRows([] if lora is None else [(lora, None)]))
            bucket.step = self._captured(bucket, step) if self.capture else step
            self._buckets[key] = bucket
        return self._buckets[key]

    # ---- one step ----------------------------------------------------------------------------------------

    def _step_of(self, bucket: Bucket, truncated: bool, lora: AdapterRows) -> Callable[[], None]:
        model, size = self.model, self.page_size

        def step() -> None:
            assert self.kv is not None
            rows = bucket.rows
            (token, position), table = rows.state, rows.table
            done = position > rows.last
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
            hidden = model.hidden(token, at, attention, lora)
            settings = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, at + 1)
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
            token.copy_(drawn[0])
            stopped = (token.unsqueeze(1) == rows.stops).any(1)
            position.copy_(torch.where(stopped, STOPPED, position + 1))

        return step

    def _captured(self, bucket: Bucket, step: Callable[[], None]) -> Callable[[], None]:
        """The step as a graph. It runs before on the stream of the capture, all rows stopped."""
        bucket.rows.state[1].fill_(STOPPED)
        bucket.rows.table.fill_(self.scratch)
        if bucket.groups is not None:
            bucket.groups[0].copy_(bucket.cu_seqlens)  # each row alone
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
        with _no_collection(), torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
            step()
        self._memory = self._memory or graph.pool()
        return graph.replay
