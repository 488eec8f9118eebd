"""Decoding k steps per host sync: one C++ call on CPU (decode_cpu), CUDA graphs on GPU (decode_gpu).

Here is what both have in common: what they are asked, what they give, and how requests become tensors.

Shapes: n requests, k steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter
from duologue.rollout.engine.scheduler import Work
from duologue.rollout.engine.sequence import BranchState, Draws, Request
from torch import Tensor

RequestSettings = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # temperature, top_k, top_p, min_p, seed, [n]


@dataclass(slots=True)
class DecodedSteps:
    """What k steps drew for n requests, on the host. Behind its last valid step a row means nothing."""

    tokens: np.ndarray  # [k, n] int64
    logprobs: np.ndarray  # [k, n] fp32
    entropies: np.ndarray  # [k, n] fp32
    support_sizes: np.ndarray  # [k, n] int64: 0 for all tokens, -1 for more than the loop holds
    support_ids: np.ndarray  # int32, one support after the other, those of a step together
    seconds: float = 0.0  # blocked in host syncs
    candidate_logprobs: Mapping[int, list[float]] = field(default_factory=dict)  # by row, of the first step
    first: np.ndarray | None = None  # [n] the first step of each that is its own, where that is not 0

    def __len__(self) -> int:
        """Steps."""
        return len(self.tokens)

    def rows(self) -> list[Draws]:
        """Those of each request."""
        tokens, logprobs, entropies = (x.T.tolist() for x in (self.tokens, self.logprobs, self.entropies))
        if self.support_sizes.any():
            sizes = self.support_sizes.T.tolist()
            supports = self._supports()
        else:
            sizes = [[0] * len(self) for _ in tokens]
            supports = [array("i")] * len(tokens)
        rows = list(map(Draws, tokens, logprobs, entropies, sizes, supports))
        if self.first is not None:
            for row in np.flatnonzero(self.first).tolist():
                rows[row].drop(int(self.first[row]))
        for row, logprobs in self.candidate_logprobs.items():
            rows[row].candidate_logprobs = logprobs
        return rows

    def then(self, later: DecodedSteps, first: np.ndarray) -> DecodedSteps:
        """With more steps of the same requests behind. What is before a row's `first` is not its own, and has
        no supports.
        """
        return DecodedSteps(
            np.concatenate((self.tokens, later.tokens)),
            np.concatenate((self.logprobs, later.logprobs)),
            np.concatenate((self.entropies, later.entropies)),
            np.concatenate((self.support_sizes, later.support_sizes)),
            np.concatenate((self.support_ids, later.support_ids)),
            self.seconds + later.seconds,
            first=first,
        )

    def _supports(self) -> list[array[int]]:
        """The ids of each request's supports."""
        sizes = np.maximum(self.support_sizes, 0)
        begins = sizes.cumsum().reshape(sizes.shape) - sizes
        of_row = sizes.T.ravel()
        ends = of_row.cumsum()
        at = np.repeat(begins.T.ravel() - (ends - of_row), of_row) + np.arange(ends[-1])
        parts = np.split(self.support_ids[at], ends.reshape(sizes.T.shape)[:-1, -1])
        return [array("i", part.tobytes()) for part in parts]


Read = Callable[[], DecodedSteps]  # waits for what was launched


class DecodeLoop(ABC):
    """Draws up to `steps` tokens for each of some requests that lack the KV of one token each, in one go.

    `adapters` is the engine's list; a branch names one by its index.
    """

    def __init__(self, model: Decoder, adapters: Sequence[Adapter | None], steps: int) -> None:
        self.model = model
        self.adapters = adapters
        self.steps = steps
        self.kv: Tensor | None = None

    def use(self, kv: Tensor) -> None:
        """Work on this memory [L, 2, P, B, Hk, D]."""
        self.kv = kv

    def leave(self) -> None:
        """That memory is given back; no request is in flight."""
        self.kv = None

    @abstractmethod
    def forget(self) -> None:
        """Other adapters stand in the list now: drop what was made for those before."""

    def takes(self, requests: Sequence[Request]) -> bool:
        """Whether these can be drawn without a host sync in between."""
        adapter = requests[0].branch.adapter
        # A list, for a generator takes twice as long, and this is asked in each call.
        return not [r for r in requests if r.plain or r.guided or r.branch.adapter != adapter]

    def parts(self, works: list[Work]) -> list[list[Work]]:
        """What of a step runs together."""
        return [works]

    @abstractmethod
    def reach(self, left: Sequence[int]) -> int:
        """Steps worth taking when the requests may draw so many tokens each."""

    @abstractmethod
    def run(self, requests: Sequence[Request], steps: int) -> Read:
        """Launch `steps` (at most `self.steps`) or fewer, for requests that it takes, whose pages reach so
        far beyond what was drawn `ahead`. Read are those drawn ahead, and these but for the next ahead.
        """


def page_table(branches: Sequence[BranchState], width: int = 0, rows: int = 0, unused: int = 0) -> np.ndarray:
    """[n, max_pages] int32, or [rows, width] where these are more; `unused` behind a branch's last page."""
    lengths = np.array([len(b.pages) for b in branches])
    table = np.full((max(rows, len(branches)), max(width, int(lengths.max()))), unused, dtype=np.int32)
    held = np.arange(table.shape[1]) < lengths[:, None]
    pages = chain.from_iterable([b.pages for b in branches])
    table[: len(branches)][held] = np.fromiter(pages, np.int32, lengths.sum())
    return table


def sampling_settings(requests: Sequence[Request]) -> RequestSettings:
    """Temperature, top_k, top_p, min_p and seed of each, [n], as `ops.sample` takes them."""
    params = [r.params for r in requests]
    return (
        torch.tensor([p.temperature for p in params], dtype=torch.float32),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params], dtype=torch.float32),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
        torch.tensor([r.seed for r in requests], dtype=torch.int64),
    )
