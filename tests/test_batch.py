"""grpo/batch.py: packing keeps what rows say, targets point at what predicts them, splits change no gradient."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import pytest
import torch
from duologue.grpo.batch import Batch, Row, pack, split_rows
from duologue.grpo.loss import LossConfig, Normaliser, policy_loss
from torch import nn


def make_rows(seed: int, n: int = 9) -> list[Row]:
    """Random rows of 1 to 12 tokens; row 4 has no trained token."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        mask = [False] + [rng.random() < 0.6 and i != 4 for _ in range(rng.randint(0, 11))]
        rows.append(
            Row(
                token_ids=[rng.randrange(20) for _ in mask],
                loss_mask=mask,
                logprobs=[-rng.random() if trained else 0.0 for trained in mask],
                advantage=rng.gauss(0, 1),
                dialogue_id=i // 2,
                role=i % 2,
            )
        )
    return rows


def test_packing_keeps_every_row() -> None:
    rows = make_rows(0)
    batch = pack(rows)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.dialogue_id.tolist() == [row.dialogue_id for row in rows]
    assert batch.role.tolist() == [row.role for row in rows]
    bounds = list(pairwise(batch.cu_seqlens.tolist()))
    assert bounds[-1][1] == len(batch.token_ids)
    for i, (row, (start, end)) in enumerate(zip(rows, bounds, strict=True)):
        here = slice(start, end)
        assert batch.token_ids[here].tolist() == row.token_ids
        assert batch.positions[here].tolist() == list(range(len(row.token_ids)))
        assert batch.loss_mask[here].tolist() == row.loss_mask
        assert batch.behaviour_logprobs[here].tolist() == pytest.approx(row.logprobs)
        assert batch.advantages[here].tolist() == pytest.approx([row.advantage] * len(row.token_ids))
        assert batch.segment_ids[here].tolist() == [i] * len(row.token_ids)


def test_targets_by_hand() -> None:
    a = Row(token_ids=[5, 6, 7], loss_mask=[0, 0, 1], logprobs=[0, 0, -0.5], advantage=2, dialogue_id=0, role=1)
    b = dataclasses.replace(a, token_ids=[8, 9], loss_mask=[0, 1], logprobs=[0, -1.0])
    batch = pack([a, dataclasses.replace(a, loss_mask=[0, 0, 0]), b])
    assert batch.targets.tolist() == [2, 7]
    assert batch.token_ids[batch.targets].tolist() == [7, 9]
    assert batch.token_ids[batch.targets - 1].tolist() == [6, 8]
    assert batch.segment_ids[batch.targets].tolist() == [0, 2]
    assert (a.n_trained, b.n_trained) == (1, 1)


@pytest.mark.parametrize("max_tokens", [1, 13, 30, 10_000])
def test_split_keeps_whole_rows_in_order_within_the_budget(max_tokens: int) -> None:
    rows = make_rows(1)
    parts = split_rows(rows, max_tokens)
    assert [row for part in parts for row in part] == rows
    sizes = [sum(len(row.token_ids) for row in part) for part in parts]
    assert all(size <= max_tokens or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    for size, following in zip(sizes, parts[1:], strict=False):
        assert size + len(following[0].token_ids) > max_tokens  # it would not have fitted
    assert split_rows([], max_tokens) == []


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_micro_batches_give_the_gradient_of_the_whole(variant: str) -> None:
    """Through a model whose hidden state at t depends on the row up to t, so a cut row or a wrong index would show."""
    rows = [row for row in make_rows(2) if row.n_trained]
    torch.manual_seed(0)
    embed, head = nn.Embedding(20, 6, dtype=torch.float64), nn.Linear(6, 20, dtype=torch.float64)
    parameters = [*embed.parameters(), *head.parameters()]
    total = Normaliser(tokens=float(sum(row.n_trained for row in rows)), rows=float(len(rows)), max_length=12.0)

    def part_loss(batch: Batch) -> torch.Tensor:
        states = torch.cat([embed(batch.token_ids[a:b]).cumsum(0) for a, b in pairwise(batch.cu_seqlens.tolist())])
        at = batch.targets
        logp = head(states[at - 1]).log_softmax(-1).gather(1, batch.token_ids[at][:, None])[:, 0]
        old, advantages = batch.behaviour_logprobs[at].double() - 2.5, batch.advantages[at].double()
        ids = batch.segment_ids[at]
        return policy_loss(LossConfig(variant=variant), logp, old, advantages, ids, len(batch.role), total)[0]

    def gradient(parts: list[list[Row]]) -> list[torch.Tensor]:
        return list(torch.autograd.grad(sum(part_loss(pack(part)) for part in parts), parameters))

    whole = gradient([rows])
    assert max(float(grad.abs().max()) for grad in whole) > 1e-3
    for parts in (split_rows(rows, 1), split_rows(rows, 17), split_rows(rows[::-1], 17)):
        assert len(parts) > 1
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-10, atol=1e-14)


def test_what_must_not_be_packed() -> None:
    good = Row(token_ids=[1, 2], loss_mask=[0, 1], logprobs=[0, -1], advantage=1, dialogue_id=7, role=0)
    with pytest.raises(ValueError, match="dialogue 7, role 0: its first token is marked for training"):
        pack([good, dataclasses.replace(good, loss_mask=[1, 1])])
    for change in ({"loss_mask": [0]}, {"logprobs": [0]}, {"token_ids": [1]}):
        with pytest.raises(AssertionError):
            pack([dataclasses.replace(good, **change)])
