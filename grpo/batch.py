"""The packed contract between rollouts and updates: one row per (dialogue, role), rows one after the other, no padding.

Position t's mask, behaviour log-prob and advantage belong to token t itself, as a target: it is predicted from position t - 1, so
the first token of a row can never be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Row:
    """One side's view of one dialogue, ready for training."""

    token_ids: list[int]  # [t]
    loss_mask: list[bool]  # [t] sampled by this policy, in a turn of a trained kind
    logprobs: list[float]  # [t] behaviour log-probs, 0 where nothing was sampled
    advantage: float
    dialogue_id: int
    role: int

    @property
    def n_trained(self) -> int:
        return sum(self.loss_mask)


@dataclass(kw_only=True, slots=True)
class Batch:
    """Packed rows: T tokens, S rows."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S + 1] int32
    loss_mask: Tensor  # [T] bool
    behaviour_logprobs: Tensor  # [T] fp32
    advantages: Tensor  # [T] fp32
    dialogue_id: Tensor  # [S] int64
    role: Tensor  # [S] int64

    @property
    def targets(self) -> Tensor:
        """Indices [N] of the trained tokens; the head runs on the positions before them only."""
        return torch.nonzero(self.loss_mask).squeeze(1)

    @property
    def segment_ids(self) -> Tensor:
        """[T] the row of each token."""
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def pack(rows: Sequence[Row], device: str | torch.device = "cpu") -> Batch:
    """Lay rows one after the other. ValueError for a row whose first token is marked: nothing predicts it."""
    for row in rows:
        if row.loss_mask and row.loss_mask[0]:
            raise ValueError(f"dialogue {row.dialogue_id}, role {row.role}: its first token is marked for training, nothing predicts it")
        assert len(row.token_ids) == len(row.loss_mask) == len(row.logprobs)
    lengths = [len(row.token_ids) for row in rows]
    return Batch(
        token_ids=torch.tensor([t for row in rows for t in row.token_ids], dtype=torch.int64, device=device),
        positions=torch.tensor([p for n in lengths for p in range(n)], dtype=torch.int64, device=device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device),
        loss_mask=torch.tensor([m for row in rows for m in row.loss_mask], dtype=torch.bool, device=device),
        behaviour_logprobs=torch.tensor([x for row in rows for x in row.logprobs], dtype=torch.float32, device=device),
        advantages=torch.tensor([row.advantage for row in rows for _ in row.token_ids], dtype=torch.float32, device=device),
        dialogue_id=torch.tensor([row.dialogue_id for row in rows], dtype=torch.int64, device=device),
        role=torch.tensor([row.role for row in rows], dtype=torch.int64, device=device),
    )


def split_rows(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Micro-batches of whole rows, in order, of at most `max_tokens` tokens each; a longer row stands alone."""
    parts: list[list[Row]] = []
    size = 0
    for row in rows:
        if not parts or size + len(row.token_ids) > max_tokens:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += len(row.token_ids)
    return parts
