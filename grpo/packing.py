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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from duologue.kernels import gather, ops, transfer
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
    advantages: list[float] | None = None  # [t] of the tokens, in place of one for all
    weights: list[float] | None = None  # [t] of the tokens in an imitation loss; None: all count alike
    share: int = 0  # of the rows of a step, where these are dealt out

    @property
    def n_trained(self) -> int:
        return sum(self.loss_mask)

    @property
    def teaches(self) -> bool:
        """Whether a trained token has an advantage other than 0."""
        if self.advantages is None:
            return self.advantage != 0 and any(self.loss_mask)
        return any(
            value != 0 for value, trained in zip(self.advantages, self.loss_mask, strict=True) if trained
        )


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
    targets: Tensor  # [N] int64: where trained tokens are; the head runs on the positions before them only
    weights: Tensor | None = None  # [T] fp32, in an imitation loss
    max_seqlen: int | None = None  # of the longest row

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
    lengths = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    token_ids = _joined([row.token_ids for row in rows], np.int64)
    loss_mask = _joined([row.loss_mask for row in rows], np.bool_)
    nodes, first = _prefix_tree(rows, token_ids, starts)
    support_ids, sizes = _supports(rows, loss_mask, starts)
    arrays = {
        "token_ids": token_ids,
        "positions": np.arange(len(token_ids)) - np.repeat(starts[:-1], lengths),
        "cu_seqlens": starts.astype(np.int32),
        "loss_mask": loss_mask,
        "behaviour_logprobs": _joined([row.logprobs for row in rows], np.float32),
        "advantages": _advantages(rows, lengths),
        "nodes": nodes,
        "first": first,
        "support_ids": support_ids,
        "support_offsets": np.concatenate(([0], np.cumsum(sizes))),
        "targets": np.flatnonzero(loss_mask),
    }
    if any(row.weights for row in rows):
        arrays["weights"] = _joined([row.weights or [] for row in rows], np.float32)
    tensors = transfer.to_device(arrays, torch.device(device))
    return Batch(**tensors, max_seqlen=int(lengths.max(initial=0)))


def _joined(lists: Sequence[Sequence[float]], dtype: Any) -> np.ndarray:
    """One after the other."""
    return np.concatenate([np.array(values, dtype=dtype) for values in lists] or [np.empty(0, dtype)])


def _advantages(rows: Sequence[Row], lengths: np.ndarray) -> np.ndarray:
    """[T], a row's own by token where it has them."""
    of_tokens = np.repeat(np.array([row.advantage for row in rows], dtype=np.float32), lengths)
    for row, end in zip(rows, np.cumsum(lengths), strict=True):
        if row.advantages is not None:
            of_tokens[end - len(row.advantages) : end] = row.advantages
    return of_tokens


def _supports(
    rows: Sequence[Row], loss_mask: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(ids of the supports of trained tokens, one after the other; the size of each token's, 0 of a token
    without).
    """
    sizes = np.zeros(len(loss_mask), dtype=np.int64)
    ids = [np.empty(0, dtype=np.int32)]
    for row, start, end in zip(rows, starts, starts[1:], strict=False):
        if row.supports is not None:
            given = np.array(row.supports.sizes, dtype=np.int64)
            trained = loss_mask[start:end]
            ids.append(np.frombuffer(row.supports.ids, dtype=np.int32)[np.repeat(trained, given)])
            sizes[start:end] = given * trained
    return np.concatenate(ids), sizes


def _prefix_tree(
    rows: Sequence[Row], token_ids: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(`nodes`, `first`): a row has the nodes of the earlier row with which it agrees longest, as far as they
    agree, and then new ones.
    """
    nodes = np.empty(len(token_ids), dtype=np.int64)
    first: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    n_nodes = 0
    for row, (other, shared) in enumerate(_longest_agreements(rows, token_ids, starts)):
        begin, new, end = starts[row], starts[row] + shared, starts[row + 1]
        nodes[begin:new] = nodes[starts[other] : starts[other] + shared]
        nodes[new:end] = np.arange(n_nodes, n_nodes + end - new)
        first.append(np.arange(new, end))
        n_nodes += end - new
    return nodes, np.concatenate(first)


def _longest_agreements(
    rows: Sequence[Row], token_ids: np.ndarray, starts: np.ndarray
) -> list[tuple[int, int]]:
    """For each row an earlier one, and the tokens that both begin with: no earlier row shares more.

    In the order of a dictionary a row agrees most with its neighbours. Rows are taken out of that order from
    the last to the first, so that the neighbours of each are those of the earlier rows.
    """
    n = len(rows)
    order = sorted(range(n), key=lambda row: rows[row].token_ids)
    before, after = [-1] * n, [-1] * n  # neighbours, and how much the row and the one before it agree
    agrees = [0] * n
    for a, b in itertools.pairwise(order):
        before[b], after[a] = a, b
        agrees[b] = _agreement(token_ids[starts[a] : starts[a + 1]], token_ids[starts[b] : starts[b + 1]])
    found = [(0, 0)] * n
    for row in reversed(range(n)):
        low, high = before[row], after[row]
        found[row] = (low, agrees[row]) if low >= 0 else (0, 0)
        if high >= 0:
            found[row] = max(found[row], (high, agrees[high]), key=lambda pair: pair[1])
            before[high], agrees[high] = low, min(agrees[row], agrees[high]) if low >= 0 else 0
        if low >= 0:
            after[low] = high
    return found


def _agreement(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows begin with alike."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    at = int(differs.argmax()) if n else 0
    return at if n and differs[at] else n


def hidden_nodes(model: Decoder, batch: Batch, dropout_seed: int | None = None) -> Tensor:
    """The hidden state of every node, [U, H]; position t's is row `batch.nodes[t]`."""
    shared = len(batch.first) < len(batch.nodes)
    nodes = gather.Index(batch.nodes, len(batch.first))

    def attention(layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Lays out rows of the nodes (here T = U), and takes the nodes' outputs back."""
        q, k, v = (nodes.take(x) if shared else x for x in (q_TAD, k_TGD, v_TGD))
        how = (model.exact, batch.max_seqlen, model.library_backward)
        out = ops.packed_attention(q, k, v, batch.cu_seqlens, model.scale, *how)
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
