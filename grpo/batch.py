"""Packed rows: what a rollout hands to the update, and how it is cut into micro-batches.

Shapes: T tokens of all rows, S rows, N trained tokens. A row is what one role of one dialogue saw and said. Whatever is
recorded at position t is about token t itself, as a target: its log-prob comes from the hidden state at t - 1, so the
first token of a row can never be trained. Provenance, not content, says what is trained: `loss_mask` is set by whoever
sampled the token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One role of one dialogue, of t tokens; what is recorded for a token that is not trained is ignored."""

    token_ids: Sequence[int]  # [t]
    loss_mask: Sequence[bool]  # [t]
    behaviour_logprobs: Sequence[float]  # [t]
    advantage: float
    dialogue_id: int
    role: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The trained tokens of a batch, in order: what the head is run for and what the loss takes."""

    hidden_index: Tensor  # [N] int64 into [T]: the position whose hidden state predicts the token
    token_ids: Tensor  # [N] int64
    behaviour_logprobs: Tensor  # [N] fp32
    advantages: Tensor  # [N] fp32
    segment_ids: Tensor  # [N] int64: the row of the token
    lengths: Tensor  # [S] int64: trained tokens of each row


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows one after the other, without padding."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each row
    cu_seqlens: Tensor  # [S + 1] int32
    loss_mask: Tensor  # [T] bool
    behaviour_logprobs: Tensor  # [T] fp32, 0 where not trained
    advantages: Tensor  # [T] fp32, 0 where not trained
    dialogue_id: Tensor  # [S] int64
    role: Tensor  # [S] int64

    @property
    def n_rows(self) -> int:
        return len(self.dialogue_id)

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def targets(self) -> Targets:
        """The trained tokens. Its size depends on the data: call it where the batch was built, on the host."""
        index = self.loss_mask.nonzero()[:, 0]
        segment_ids = torch.searchsorted(self.cu_seqlens[1:].long(), index, right=True)
        return Targets(
            hidden_index=index - 1,
            token_ids=self.token_ids[index],
            behaviour_logprobs=self.behaviour_logprobs[index],
            advantages=self.advantages[index],
            segment_ids=segment_ids,
            lengths=torch.bincount(segment_ids, minlength=self.n_rows),
        )

    def select(self, rows: Sequence[int]) -> Batch:
        """These rows, in this order."""
        bounds = self.cu_seqlens.tolist()
        index = torch.cat([torch.arange(0), *(torch.arange(bounds[row], bounds[row + 1]) for row in rows)])
        index, picked = index.to(self.token_ids.device), torch.tensor(rows, dtype=torch.int64, device=self.role.device)
        lengths = (bounds[row + 1] - bounds[row] for row in rows)
        return Batch(
            token_ids=self.token_ids[index],
            positions=self.positions[index],
            cu_seqlens=_cumulative(lengths).to(self.cu_seqlens.device),
            loss_mask=self.loss_mask[index],
            behaviour_logprobs=self.behaviour_logprobs[index],
            advantages=self.advantages[index],
            dialogue_id=self.dialogue_id[picked],
            role=self.role[picked],
        )

    def split(self, max_tokens: int, *, skip_zero_advantage: bool = False) -> list[Batch]:
        """Micro-batches of whole rows in their order, each of at most `max_tokens` tokens unless one row is longer.

        Rows are neither sorted nor cut: there is no padding that sorting would save, and a group stays together. Rows
        without a trained token are left out. `skip_zero_advantage` also leaves out rows with zero advantages only: the
        surrogate has no gradient there, but KL, entropy and statistics would. Normalisers stay those of the whole.
        """
        if max_tokens < 1:
            raise ValueError(f"tokens per micro-batch = {max_tokens}: accepted is an integer >= 1")
        used = self.loss_mask & (self.advantages != 0) if skip_zero_advantage else self.loss_mask
        before = [0, *used.cumsum(0).tolist()]
        bounds = self.cu_seqlens.tolist()
        chunks: list[list[int]] = []
        filled = 0
        for row, (start, end) in enumerate(pairwise(bounds)):
            if before[start] == before[end]:
                continue
            if not chunks or filled + end - start > max_tokens:
                chunks.append([])
                filled = 0
            chunks[-1].append(row)
            filled += end - start
        return [self.select(chunk) for chunk in chunks]


def pack(rows: Iterable[Row]) -> Batch:
    """Rows to tensors on the host. Anything recorded for an untrained token becomes 0."""
    rows = list(rows)
    for row in rows:
        n = len(row.token_ids)
        assert n > 0, "an empty row"
        assert n == len(row.loss_mask) == len(row.behaviour_logprobs), "ids, mask and log-probs differ in length"
        assert not row.loss_mask[0], "the first token of a row has nothing before it to be predicted from"
    mask = torch.tensor([*chain.from_iterable(row.loss_mask for row in rows)], dtype=torch.bool)
    logprobs = torch.tensor([*chain.from_iterable(row.behaviour_logprobs for row in rows)], dtype=torch.float32)
    lengths = torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int64)
    cu_seqlens = _cumulative(lengths.tolist())
    advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float32).repeat_interleave(lengths)
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths)
    batch = Batch(
        token_ids=torch.tensor([*chain.from_iterable(row.token_ids for row in rows)], dtype=torch.int64),
        positions=torch.arange(len(mask)) - starts,
        cu_seqlens=cu_seqlens,
        loss_mask=mask,
        behaviour_logprobs=logprobs.where(mask, 0.0),
        advantages=advantages.where(mask, 0.0),
        dialogue_id=torch.tensor([row.dialogue_id for row in rows], dtype=torch.int64),
        role=torch.tensor([row.role for row in rows], dtype=torch.int64),
    )
    assert batch.advantages.isfinite().all(), "a trained token needs a finite advantage"
    logprobs = batch.behaviour_logprobs
    assert (logprobs.isfinite() & (logprobs < 1e-4)).all(), "a trained token needs the log-prob it was sampled with"
    return batch


def _cumulative(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
