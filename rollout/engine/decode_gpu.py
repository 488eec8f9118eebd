"""Decoding k steps with all state on the device, so that the host reads once per k steps.

Each step reads and writes buffers of fixed size: the token of every row, its position, block table, sampling
parameters and whether it has stopped. So a step is the same launches every time, captured once per batch size
and replayed as a CUDA graph, with the sampler in it. Pages for all steps are reserved before; a row that
stops early goes on writing to a page that nobody reads.

Shapes: B rows of the bucket, n requests in them, k steps, W pages of a row, S stop tokens, M support ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from duologue.kernels import backend, ops, transfer
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter, AdapterRows
from duologue.rollout.engine.attention import PagedAttention, shared_groups
from duologue.rollout.engine.decode import DecodedSteps, DecodeLoop, page_table, sampling_settings
from duologue.rollout.engine.scheduler import Work
from duologue.rollout.engine.sequence import Request
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows
WIDTHS = (16, 64, 256, 1024, 4096, 1 << 20)  # pages of a row
SUPPORT_IDS = 512  # of a truncated draw that a step holds; with more a plain step draws that token again
STOPS = 16
UNUSED = (1.0, 0, 1.0, 0.0, 0)  # settings of a row without a request


class _Rows(NamedTuple):
    """What a step knows of each of B rows, of which those without a request have stopped; and of their
    shared prefixes, where some have one (see `shared_groups`). Parts of one buffer, which is filled by one
    copy.
    """

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
    step_index: Tensor  # [1] where the next draws go
    starts: Tensor | None = None  # [B + 1] int32
    shared: Tensor | None = None  # [B] int32


Arrays = dict[str, np.ndarray]


def _settings(requests: Sequence[Request], B: int) -> Arrays:
    """What of `_Rows` does not change while the requests are the same."""
    n = len(requests)
    stops = np.full((B, STOPS), -1)
    for row, request in zip(stops, requests, strict=False):
        row[: len(request.stop_token_ids)] = sorted(request.stop_token_ids)
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    settings = dict(zip(names, (x.numpy() for x in sampling_settings(requests)), strict=True))
    unused = dict(zip(names, UNUSED, strict=True))
    filled = {
        name: np.concatenate((values, np.full(B - n, unused[name], values.dtype)))
        for name, values in settings.items()
    }
    return {"done": np.arange(B) >= n, "stops": stops, **filled}


class _Bucket:
    """Buffers on a device for rows like `arrays`; `step` replays or runs one step on them."""

    def __init__(self, arrays: Arrays, k: int, truncated: bool, device: torch.device) -> None:
        B = len(arrays["token"])
        self.pin = device.type == "cuda"
        # Zeros, for a graph's warm-up runs before they are filled, and reads the embedding of `token`.
        self._memory = torch.zeros_like(transfer.joined(arrays, pin=False), device=device)
        self.rows = _Rows(**transfer.parts(self._memory, arrays))
        starts, shared = self.rows.starts, self.rows.shared
        self.groups = None if starts is None or shared is None else (starts, shared)
        self.cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=device)
        self.step_index = self.rows.step_index
        self.support_limit = SUPPORT_IDS if truncated else 1
        self._drawn: Arrays = {
            "token": np.zeros((k, B), np.int64),
            "logprob": np.zeros((k, B), np.float32),
            "entropy": np.zeros((k, B), np.float32),
            "support_size": np.zeros((k, B), np.int32),
        }
        self._out = torch.zeros_like(transfer.joined(self._drawn, pin=False), device=device)
        self._support_ids = torch.zeros((k, B, self.support_limit), dtype=torch.int32, device=device)
        out = transfer.parts(self._out, self._drawn)
        size = out.pop("support_size")
        # In the order of what `ops.sample_bounded` returns.
        self.out = {**out, "support_ids": self._support_ids, "support_size": size}
        self.step: Callable[[], None]

    def fill(self, arrays: Arrays) -> None:
        """By one copy, which nobody waits for."""
        self._memory.copy_(transfer.joined(arrays, self.pin), non_blocking=True)

    def read(self, steps: int, n: int) -> DecodedSteps:
        """What the first n rows drew in the first steps, by one copy, and another where a draw was
        truncated.
        """
        began = time.perf_counter()
        out = transfer.parts(self._out.to("cpu", copy=True), self._drawn)
        seconds = time.perf_counter() - began
        tokens, logprobs, entropies, sizes = (x[:steps, :n].numpy() for x in out.values())
        support_sizes = np.where(sizes > self.support_limit, -1, sizes)
        support_ids = np.empty(0, np.int32)
        if support_sizes.any():
            ids = self._support_ids[:steps, :n].cpu().numpy()
            support_ids = ids[np.arange(ids.shape[2]) < support_sizes[..., None]]
        return DecodedSteps(tokens, logprobs, entropies, support_sizes, support_ids, seconds)


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
        self._buckets: dict[tuple[tuple[int, ...], bool, int, bool], _Bucket] = {}
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

    def forget(self) -> None:
        """The pool goes with its graphs: a dead one may not be captured into."""
        self._buckets.clear()
        self._memory = None

    def takes(self, requests: Sequence[Request]) -> bool:
        return (
            super().takes(requests)
            and len(requests) <= BUCKETS[-1]
            and max(len(r.stop_token_ids) for r in requests) <= STOPS
        )

    def parts(self, works: list[Work]) -> list[list[Work]]:
        """Rows that decode keep their graph beside the prefill of others."""
        ahead: list[Work] = []
        others: list[Work] = []
        for work in works:
            request = work.request
            decodes = work.samples and work.n_tokens == 1 and not (request.plain or request.guided)
            (ahead if decodes and len(request.stop_token_ids) <= STOPS else others).append(work)
        apart = self.capture and ahead and others and self.takes([w.request for w in ahead])
        return [others, ahead] if apart else [works]

    def reach(self, left: Sequence[int]) -> int:
        """Until the last one ends, for a row that has stopped costs nothing more."""
        return min(self.steps, max(left))

    @torch.no_grad()
    def run(self, requests: Sequence[Request], steps: int) -> DecodedSteps:
        bucket = self._filled(requests)
        for _ in range(steps):
            bucket.step()
        return bucket.read(steps, len(requests))

    # ---- buffers -----------------------------------------------------------------------------------------

    def _filled(self, requests: Sequence[Request]) -> _Bucket:
        """The bucket for these requests, with their state in its first rows; the others are stopped."""
        branches = [r.branch for r in requests]
        size = next(b for b in BUCKETS if b >= len(requests))
        width = next(w for w in WIDTHS if w >= max(len(b.pages) for b in branches))
        width = min(width, -(-self.model.config.max_position_embeddings // self.page_size) + 1)
        arrays = self._arrays(requests, size, width)
        truncated = any(r.params.truncates for r in requests)
        bucket = self._bucket(arrays, truncated, branches[0].adapter)
        bucket.fill(arrays)
        return bucket

    def _arrays(self, requests: Sequence[Request], B: int, W: int) -> Arrays:
        """The state of the requests as `_Rows` has it."""
        if list(requests) != self._known or len(self._settings["done"]) != B:
            self._known, self._settings = list(requests), _settings(requests, B)
        branches = [r.branch for r in requests]
        n = len(requests)
        numbers = np.zeros((3, B), np.int64)
        numbers[0, :n] = [b.token_ids[-1] for b in branches]
        numbers[1, :n] = [b.n_cached for b in branches]
        numbers[2, :n] = [r.n_left for r in requests]
        numbers[2, :n] += numbers[1, :n] - 1
        by_name = {
            **dict(zip(("token", "position", "last"), numbers, strict=True)),
            **self._settings,
            "table": page_table(branches, W, B, self.scratch),
            "step_index": np.zeros(1, np.int64),
        }
        arrays = {name: by_name[name] for name in _Rows._fields if name in by_name}
        assert self.kv is not None
        if backend.triton(self.kv):  # the C++ kernels see by themselves what rows share
            groups = shared_groups(by_name["table"][:n], numbers[1, :n], self.page_size, B)
            arrays |= {} if groups is None else {"starts": groups[0], "shared": groups[1]}
        return arrays

    def _bucket(self, arrays: Arrays, truncated: bool, adapter: int) -> _Bucket:
        key = arrays["table"].shape, truncated, adapter, "starts" in arrays
        if key not in self._buckets:
            bucket = _Bucket(arrays, self.steps, truncated, self.device)
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
            settings = (*bucket.rows[6:11], position + 1)
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
