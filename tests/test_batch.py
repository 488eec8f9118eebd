"""grpo/batch.py: packing keeps what rows say, targets point at what predicts them, splits change no gradient."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import pytest
import torch
from duologue.grpo.batch import Batch, Row, pack
from duologue.grpo.loss import LossConfig, Normaliser, policy_loss
from torch import nn


def make_rows(seed: int, n: int = 9) -> list[Row]:
    """Random rows of 1 to 12 tokens; row 4 has no trained token, row 2 and 5 no advantage."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        length = rng.randint(1, 12)
        mask = [False] + [rng.random() < 0.6 and i != 4 for _ in range(length - 1)]
        rows.append(
            Row(
                token_ids=[rng.randrange(20) for _ in range(length)],
                loss_mask=mask,
                behaviour_logprobs=[-rng.random() if trained else float("nan") for trained in mask],
                advantage=0.0 if i in (2, 5) else rng.gauss(0, 1),
                dialogue_id=i // 2,
                role=i % 2,
            )
        )
    return rows


def unpack(batch: Batch) -> list[tuple[list[int], list[int], list[bool], list[float], list[float], int, int]]:
    bounds = batch.cu_seqlens.tolist()
    return [
        (
            *(getattr(batch, name)[start:end].tolist() for name in PER_TOKEN),
            int(batch.dialogue_id[row]),
            int(batch.role[row]),
        )
        for row, (start, end) in enumerate(pairwise(bounds))
    ]


PER_TOKEN = ("token_ids", "positions", "loss_mask", "behaviour_logprobs", "advantages")


def test_packing_keeps_every_row() -> None:
    rows = make_rows(0)
    batch = pack(rows)
    assert (batch.n_rows, batch.n_tokens) == (len(rows), sum(len(row.token_ids) for row in rows))
    assert batch.cu_seqlens.dtype == torch.int32
    for row, (ids, positions, mask, logprobs, advantages, dialogue, role) in zip(rows, unpack(batch), strict=True):
        assert ids == row.token_ids
        assert positions == list(range(len(ids)))
        assert mask == row.loss_mask
        for trained, given, kept, advantage in zip(mask, row.behaviour_logprobs, logprobs, advantages, strict=True):
            assert kept == (pytest.approx(given) if trained else 0)
            assert advantage == (pytest.approx(row.advantage) if trained else 0)
        assert (dialogue, role) == (row.dialogue_id, row.role)


def test_targets_by_hand() -> None:
    a = Row(
        token_ids=[5, 6, 7], loss_mask=[0, 0, 1], behaviour_logprobs=[0, 0, -0.5], advantage=2, dialogue_id=0, role=1
    )
    b = dataclasses.replace(a, token_ids=[8, 9], loss_mask=[0, 1], behaviour_logprobs=[0, -1.0], advantage=-1)
    untrained = dataclasses.replace(a, loss_mask=[0, 0, 0])
    targets = pack([a, untrained, b]).targets()
    assert targets.hidden_index.tolist() == [1, 6]
    assert targets.token_ids.tolist() == [7, 9]
    assert targets.behaviour_logprobs.tolist() == [-0.5, -1.0]
    assert targets.advantages.tolist() == [2, -1]
    assert targets.segment_ids.tolist() == [0, 2]
    assert targets.lengths.tolist() == [1, 0, 1]


@pytest.mark.parametrize("max_tokens", [1, 13, 30, 10_000])
def test_split_keeps_whole_rows_in_order_within_the_budget(max_tokens: int) -> None:
    rows = make_rows(1)
    batch = pack(rows)
    parts = batch.split(max_tokens)
    assert all(part.n_tokens <= max_tokens or part.n_rows == 1 for part in parts)
    trained = [row for row in unpack(batch) if any(row[2])]
    assert [row for part in parts for row in unpack(part)] == trained
    for part, following in pairwise(parts):
        assert part.n_tokens + int(following.cu_seqlens[1]) > max_tokens  # it would not have fitted
    skipping = batch.split(max_tokens, skip_zero_advantage=True)
    assert [row for part in skipping for row in unpack(part)] == [row for row in trained if any(row[4])]


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_micro_batches_give_the_gradient_of_the_whole(variant: str) -> None:
    """Through a model whose hidden state at t depends on the row up to t, so a cut row or a wrong index would show."""
    batch = pack(make_rows(2))
    torch.manual_seed(0)
    embed, head = nn.Embedding(20, 6, dtype=torch.float64), nn.Linear(6, 20, dtype=torch.float64)
    parameters = [*embed.parameters(), *head.parameters()]
    normaliser = Normaliser.of(batch.targets().lengths, max_length=12)

    def gradient(parts: list[Batch]) -> list[torch.Tensor]:
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            t = part.targets()
            bounds = part.cu_seqlens.tolist()
            states = [embed(part.token_ids[a:b]).cumsum(0) for a, b in pairwise(bounds)]
            logp = head(torch.cat(states)[t.hidden_index]).log_softmax(-1).gather(1, t.token_ids[:, None])[:, 0]
            old, advantages = t.behaviour_logprobs.double() - 2.5, t.advantages.double()
            total = (
                total
                + policy_loss(LossConfig(variant=variant), logp, old, advantages, t.segment_ids, t.lengths, normaliser)[
                    0
                ]
            )
        return list(torch.autograd.grad(total, parameters))

    whole = gradient([batch])
    assert max(float(grad.abs().max()) for grad in whole) > 1e-3
    for parts in (batch.split(1), batch.split(17), batch.split(17, skip_zero_advantage=True)):
        assert len(parts) > 1
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-10, atol=1e-14)


def test_select_reorders_rows() -> None:
    batch = pack(make_rows(3))
    rows = unpack(batch)
    assert unpack(batch.select([7, 0, 3])) == [rows[7], rows[0], rows[3]]
    assert batch.select([]).split(10) == []
    assert unpack(batch.to("cpu")) == rows


def test_what_must_not_be_packed() -> None:
    good = Row(token_ids=[1, 2], loss_mask=[0, 1], behaviour_logprobs=[0, -1], advantage=1, dialogue_id=0, role=0)
    for change in (
        {"loss_mask": [1, 1]},  # the first token has no prediction
        {"loss_mask": [1]},
        {"token_ids": [], "loss_mask": [], "behaviour_logprobs": []},
        {"behaviour_logprobs": [0, float("nan")]},
        {"behaviour_logprobs": [0, 0.1]},
        {"advantage": float("nan")},
    ):
        with pytest.raises(AssertionError):
            pack([dataclasses.replace(good, **change)])
    with pytest.raises(ValueError, match="tokens per micro-batch = 0: accepted is an integer >= 1"):
        pack([good]).split(0)
