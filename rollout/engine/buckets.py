"""The buffers of the device's decode loop: what a step knows of each row, what it draws, how that is read.

Shapes: B rows of the bucket, n requests in them, k steps, W pages of a row, S stop tokens, M support ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from duologue.kernels import transfer
from duologue.rollout.engine.decode import DecodedSteps, sampling_settings
from duologue.rollout.engine.sequence import Request
from torch import Tensor

SUPPORT_IDS = 512  # of a truncated draw that a step holds; with more a plain step draws that token again
STOPS = 16
STOPPED = 1 << 40  # the position of a row that has drawn a stop token: behind every last one
UNUSED = (1.0, 0, 1.0, 0.0, 0)  # settings of a row without a request

Arrays = dict[str, np.ndarray]


class Rows(NamedTuple):
    """What a step knows of each of B rows; and of their shared prefixes, where some have one (see
    `shared_groups`). Parts of one buffer, which is filled by one copy.

    A row whose position is behind its last has stopped; those without a request have from the start.
    """

    state: Tensor  # [2, B] token and position: the steps change them
    source: Tensor  # [B] the row of the bucket before whose state goes on here,
    goes_on: Tensor  # [B] bool, where one does
    last: Tensor  # [B] the position of the last token to draw
    table: Tensor  # [B, W] int32
    stops: Tensor  # [B, S] -1 for none
    temperature: Tensor  # [B], as the others of `sampling_settings`
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    step_index: Tensor  # [1] where the next draws go
    starts: Tensor | None = None  # [B + 1] int32
    shared: Tensor | None = None  # [B] int32


def settings_arrays(requests: Sequence[Request], B: int) -> Arrays:
    """What of `Rows` does not change while the requests are the same."""
    n = len(requests)
    stops = np.full((B, STOPS), -1)
    for row, request in enumerate(requests):
        if request.stop_token_ids:
            stops[row, : len(request.stop_token_ids)] = sorted(request.stop_token_ids)
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    settings = dict(zip(names, (x.numpy() for x in sampling_settings(requests)), strict=True))
    unused = dict(zip(names, UNUSED, strict=True))
    filled = {
        name: np.concatenate((values, np.full(B - n, unused[name], values.dtype)))
        for name, values in settings.items()
    }
    return {"stops": stops, **filled}


def widened(arrays: Arrays, B: int) -> Arrays:
    """Arrays of the same kinds for B rows. Their values mean nothing."""
    shapes = {"state": (2, B), "step_index": (1,), "starts": (B + 1,)}
    return {name: np.zeros(shapes.get(name, (B, *x.shape[1:])), x.dtype) for name, x in arrays.items()}


class Reading:
    """What some steps drew, on its way to the host from when it was made: nobody waits but `decoded`."""

    def __init__(self, out: Tensor, ids: Tensor | None, shapes: Arrays, steps: slice, limit: int) -> None:
        self._shapes = shapes
        self._steps = steps
        self._limit = limit
        self._out = transfer.to_host(out)
        self._ids = None if ids is None else transfer.to_host(ids[steps])
        self._arrived = transfer.recorded(out.device)

    def wait(self) -> None:
        """Until the steps have run and this is here."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def decoded(self, rows: np.ndarray | slice, meant: np.ndarray | None = None) -> DecodedSteps:
        """Of these rows; those that are not `meant` have no supports."""
        began = time.perf_counter()
        self.wait()
        seconds = time.perf_counter() - began
        parts = transfer.array_parts(self._out.numpy(), self._shapes).values()
        tokens, logprobs, entropies, sizes = (x[self._steps, rows] for x in parts)
        sizes = np.where(sizes > self._limit, -1, sizes)
        if meant is not None:
            sizes[:, ~meant] = 0
        ids = np.empty(0, np.int32)
        if self._ids is not None and sizes.any():
            held = self._ids.numpy()[:, rows]
            ids = held[np.arange(held.shape[2]) < sizes[..., None]]
        return DecodedSteps(tokens, logprobs, entropies, sizes, ids, seconds)


class Bucket:
    """Buffers on a device for rows like `arrays`; `step` replays or runs one step on them."""

    def __init__(self, arrays: Arrays, k: int, truncated: bool, device: torch.device) -> None:
        B = len(arrays["stops"])
        # Zeros, for a graph's warm-up runs before they are filled, and reads the embedding of a token.
        self._here = transfer.joined(arrays, pin=device.type == "cuda")
        self._memory = torch.zeros_like(self._here, device=device)
        self._into = transfer.array_parts(self._here.numpy(), arrays)
        self._sent: torch.cuda.Event | None = None
        self.rows = Rows(**transfer.parts(self._memory, arrays))
        starts, shared = self.rows.starts, self.rows.shared
        self.groups = None if starts is None or shared is None else (starts, shared)
        self.cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=device)
        self.step_index = self.rows.step_index
        self.truncated = truncated
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

    def fill(self, arrays: Arrays, before: Tensor | None) -> None:
        """By one copy, which nobody waits for. Some rows go on from `before`, the state of the bucket that
        ran last.
        """
        kept = None if before is None else before.clone()  # it may be this bucket's own
        if self._sent is not None:
            self._sent.synchronize()  # long since, and then `_here` may be written again
        for name, array in arrays.items():
            self._into[name][...] = array
        self._memory.copy_(self._here, non_blocking=True)
        self._sent = transfer.recorded(self._memory.device)
        if kept is not None:
            state, source, goes_on = self.rows[:3]
            torch.where(goes_on, kept.index_select(1, source), state, out=state)

    def send(self, first: int, end: int) -> Reading:
        """What these steps drew goes to the host, by one copy, and another where draws are truncated."""
        ids = self._support_ids if self.truncated else None
        return Reading(self._out, ids, self._drawn, slice(first, end), self.support_limit)
