"""The packed contract between rollouts and updates: one row per (dialogue, role), rows one after the other,
no padding.

Position t's mask, behaviour log-prob and advantage belong to token t itself, as a target: it is predicted
from position t - 1, so the first token of a row can never be trained.

The rows of a group begin alike. Positions of equal prefixes have equal hidden states, so each is a node of a
tree and goes through the model once; only attention sees the rows at full length.

    rows, T = 16 tokens      tree, U = 9 nodes                       nodes           first
    the deal ? I want two    the - deal - ? -+- I -+- want - two     0 1 2 3 4 5     0 1 2 3 4 5
    the deal ? I take all                    |     `- take - all     0 1 2 3 6 7     10 11
    the deal ? no                            `- no                   0 1 2 8         15
    (prompt up to "?", then trained tokens, the targets)

`nodes` says which node a position is, `first` the position where a node occurs first. The target "take" at
position 10 is predicted from position 9, which is node 3, as the target "want" of the row above is.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from duologue.kernels import gather, ops
from duologue.model.decoder import Decoder
from duologue.rollout.engine.sequence import Supports
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
    supports: Supports | None = None  # [t] supports of truncated draws; None: all were from the full softmax
    weights: list[float] | None = None  # [t] of the tokens in an imitation loss; None: all count alike

    @property
    def n_trained(self) -> int:
        return sum(self.loss_mask)


@dataclass(kw_only=True, slots=True)
class Batch:
    """Packed rows: T tokens, S rows, U nodes."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S + 1] int32
    loss_mask: Tensor  # [T] bool
    behaviour_logprobs: Tensor  # [T] fp32
    advantages: Tensor  # [T] fp32
    nodes: Tensor  # [T] int64: positions with the same prefix have the same node, 0 .. U - 1
    first: Tensor  # [U] int64: where in T each node occurs first
    support_ids: Tensor  # int32: supports of the trained tokens whose draw was truncated, one after the other
    support_offsets: Tensor  # [T + 1] int64: where each token's begins; all other tokens have none
    weights: Tensor | None = None  # [T] fp32, in an imitation loss

    @property
    def targets(self) -> Tensor:
        """Indices [N] of the trained tokens; the head runs on the positions before them only."""
        return torch.nonzero(self.loss_mask).squeeze(1)

    @property
    def target_ids(self) -> Tensor:
        """[N] the trained tokens."""
        return self.token_ids[self.targets]

    @property
    def segment_ids(self) -> Tensor:
        """[T] the row of each token."""
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def pack(rows: Sequence[Row], device: str | torch.device = "cpu") -> Batch:
    """Lay rows one after the other. ValueError for a row whose first token is marked: nothing predicts it."""
    for row in rows:
        if row.loss_mask and row.loss_mask[0]:
            raise ValueError(
                f"dialogue {row.dialogue_id}, role {row.role}: its first token is marked for training"
            )
        assert len(row.token_ids) == len(row.loss_mask) == len(row.logprobs)

    def tensor(values: Sequence[float] | Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    lengths = [len(row.token_ids) for row in rows]
    nodes, first = _prefix_tree(rows)
    support_ids, sizes = _supports(rows)
    weights = [w for row in rows for w in row.weights or ()]
    return Batch(
        token_ids=tensor([t for row in rows for t in row.token_ids], torch.int64),
        positions=tensor([p for n in lengths for p in range(n)], torch.int64),
        cu_seqlens=tensor([0, *accumulate(lengths)], torch.int32),
        loss_mask=tensor([m for row in rows for m in row.loss_mask], torch.bool),
        behaviour_logprobs=tensor([x for row in rows for x in row.logprobs], torch.float32),
        advantages=tensor([row.advantage for row in rows for _ in row.token_ids], torch.float32),
        nodes=tensor(nodes, torch.int64),
        first=tensor(first, torch.int64),
        support_ids=tensor(support_ids, torch.int32),
        support_offsets=tensor([0, *accumulate(sizes)], torch.int64),
        weights=tensor(weights, torch.float32) if weights else None,
    )


def _supports(rows: Sequence[Row]) -> tuple[array[int], list[int]]:
    """(ids of the supports of trained tokens, one after the other; the size of each token's, 0 of a
    token without)."""
    ids: array[int] = array("i")
    sizes: list[int] = []
    for row in rows:
        if row.supports is None:
            sizes += [0] * len(row.token_ids)
            continue
        start = 0
        for size, trained in zip(row.supports.sizes, row.loss_mask, strict=True):
            if trained:
                ids += row.supports.ids[start : start + size]
            sizes.append(size if trained else 0)
            start += size
    return ids, sizes


def _prefix_tree(rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """(`nodes`, `first`)"""
    children: dict[tuple[int, int], int] = {}  # (parent node, token id) -> node
    nodes: list[int] = []
    first: list[int] = []
    for row in rows:
        node = -1
        for token in row.token_ids:
            node = children.setdefault((node, token), len(first))
            if node == len(first):
                first.append(len(nodes))
            nodes.append(node)
    return nodes, first


def hidden_nodes(model: Decoder, batch: Batch, dropout_seed: int | None = None) -> Tensor:
    """The hidden state of every node, [U, H]; position t's is row `batch.nodes[t]`."""
    shared = len(batch.first) < len(batch.nodes)
    nodes = gather.Index(batch.nodes, len(batch.first))

    def attention(layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Lays out rows of the nodes (here T = U), and takes the nodes' outputs back."""
        q, k, v = (nodes.take(x) if shared else x for x in (q_TAD, k_TGD, v_TGD))
        out = ops.packed_attention(q, k, v, batch.cu_seqlens, model.scale, model.exact)
        return out.index_select(0, batch.first) if shared else out

    adapter = model.rows(dropout_seed)
    return model.hidden(batch.token_ids[batch.first], batch.positions[batch.first], attention, adapter)


def split_rows(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Micro-batches of whole rows, in order, of at most `max_tokens` tokens each; a longer row stands
    alone."""
    parts: list[list[Row]] = []
    size = 0
    for row in rows:
        if not parts or size + len(row.token_ids) > max_tokens:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += len(row.token_ids)
    return parts
