"""Decoding k steps per host sync: one C++ call on CPU (decode_cpu), CUDA graphs on GPU (decode_gpu).

Here is what both have in common: what they are asked, what they give, and how requests become tensors.

Shapes: n requests, k steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter
from duologue.rollout.engine.sequence import BranchState, Draw, Request
from torch import Tensor

RequestSettings = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # temperature, top_k, top_p, min_p, seed, [n]


@dataclass(slots=True)
class DecodedSteps:
    """What k steps drew for n requests, on the host. Behind its last valid step a row means nothing."""

    tokens: list[list[int]]  # [k][n]
    logprobs: list[list[float]]  # [k][n]
    entropies: list[list[float]]  # [k][n]
    support_sizes: np.ndarray  # [k, n] int64: 0 for all tokens, -1 for more than the loop holds
    support_ids: array[int]  # one support after the other
    seconds: float = 0.0  # blocked in host syncs
    candidate_logprobs: Mapping[int, list[float]] = field(default_factory=dict)  # by row, of the first step
    _ends: np.ndarray = field(init=False)  # [k, n] of each support in `support_ids`

    def __post_init__(self) -> None:
        sizes = np.maximum(self.support_sizes, 0)
        self._ends = sizes.cumsum().reshape(sizes.shape)

    def __len__(self) -> int:
        """Steps."""
        return len(self.tokens)

    def overflows(self, step: int, row: int) -> bool:
        """Whether the support of this draw is unknown, so that a plain step must draw the token again."""
        return bool(self.support_sizes[step, row] < 0)

    def at(self, step: int, row: int) -> Draw:
        end = int(self._ends[step, row])
        support = self.support_ids[end - int(self.support_sizes[step, row]) : end]
        candidates = self.candidate_logprobs.get(row, ()) if step == 0 else ()
        token, logprob, entropy = self.tokens[step][row], self.logprobs[step][row], self.entropies[step][row]
        return Draw(token, logprob, entropy, support, candidates)


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

    @abstractmethod
    def forget(self) -> None:
        """Other adapters stand in the list now: drop what was made for those before."""

    def takes(self, requests: Sequence[Request]) -> bool:
        """Whether these can be drawn without a host sync in between."""
        one_adapter = len({r.branch.adapter for r in requests}) == 1
        return one_adapter and not any(
            r.params.allow is not None or r.params.stop_strings or r.candidates for r in requests
        )

    @abstractmethod
    def reach(self, left: Sequence[int]) -> int:
        """Steps worth taking when the requests may draw so many tokens each."""

    @abstractmethod
    def run(self, requests: Sequence[Request], steps: int) -> DecodedSteps:
        """`steps` (at most `self.steps`) or fewer, for requests that it takes, whose pages reach so far."""


def page_table(branches: Sequence[BranchState]) -> Tensor:
    """[n, max_pages] int32, 0 behind a branch's last page."""
    table = np.zeros((len(branches), max(len(b.pages) for b in branches)), dtype=np.int32)
    for i, branch in enumerate(branches):
        table[i, : len(branch.pages)] = branch.pages
    return torch.from_numpy(table)


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
