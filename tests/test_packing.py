"""grpo/batch.py: packing keeps what rows say, targets point at what predicts them, splits change no
gradient."""

from __future__ import annotations

import dataclasses
import random
from array import array
from itertools import pairwise

import numpy as np
import pytest
import torch
from duologue.grpo.loss import LossConfig, Normaliser, policy_loss
from duologue.grpo.packing import Batch, Row, hidden_nodes, pack, split_rows
from duologue.grpo.update import trained_logprobs
from duologue.kernels import gather, ops, transfer
from duologue.model.decoder import score
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams, Supports
from tiny import decoder
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


def test_supports_are_packed_for_trained_tokens_only() -> None:
    supports = Supports([0, 0, 2, 0, 3, 1], array("i", [4, 7, 1, 2, 3, 9]))
    mask = [False, False, True, True, False, True]
    a = Row(
        token_ids=[5, 6, 7, 8, 2, 9],
        loss_mask=mask,
        logprobs=[0.0] * 6,
        advantage=2,
        dialogue_id=0,
        role=1,
        supports=supports,
    )
    batch = pack([dataclasses.replace(a, supports=None), a])
    assert batch.support_ids.tolist() == [4, 7, 9]
    assert batch.support_offsets.tolist() == [0] * 9 + [2, 2, 2, 3]
    assert batch.support_offsets[batch.targets].tolist() == [0, 0, 0, 0, 2, 2]


def test_targets_by_hand() -> None:
    a = Row(
        token_ids=[5, 6, 7], loss_mask=[0, 0, 1], logprobs=[0, 0, -0.5], advantage=2, dialogue_id=0, role=1
    )
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
    """Through a model whose hidden state at t depends on the row up to t, so a cut row or a wrong index would
    show.
    """
    rows = [row for row in make_rows(2) if row.n_trained]
    torch.manual_seed(0)
    embed, head = nn.Embedding(20, 6, dtype=torch.float64), nn.Linear(6, 20, dtype=torch.float64)
    parameters = [*embed.parameters(), *head.parameters()]
    total = Normaliser(
        tokens=float(sum(row.n_trained for row in rows)), rows=float(len(rows)), max_length=12.0
    )

    def part_loss(batch: Batch) -> torch.Tensor:
        states = torch.cat(
            [embed(batch.token_ids[a:b]).cumsum(0) for a, b in pairwise(batch.cu_seqlens.tolist())]
        )
        at = batch.targets
        logp = head(states[at - 1]).log_softmax(-1).gather(1, batch.token_ids[at][:, None])[:, 0]
        old, advantages = batch.behaviour_logprobs[at].double() - 2.5, batch.advantages[at].double()
        ids = batch.segment_ids[at]
        return policy_loss(
            LossConfig(variant=variant), logp, old, advantages, ids, len(batch.cu_seqlens) - 1, total
        )[0]

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


def tree_rows() -> list[Row]:
    """Groups that share a prompt, two of whose rows also begin their reply alike; one row is another's
    prefix.
    """
    rng = random.Random(0)
    rows = []
    for group in range(3):
        prompt = [rng.randrange(40) for _ in range(19)]
        for reply in ([1, 2, 3, 4], [1, 2, 5], [6], [1, 2]):
            ids = prompt + reply
            mask = [t >= 19 for t in range(len(ids))]
            rows.append(
                Row(
                    token_ids=ids,
                    loss_mask=mask,
                    logprobs=[-1.0] * len(ids),
                    advantage=1.0,
                    dialogue_id=group,
                    role=0,
                )
            )
    return rows


def test_equal_prefixes_are_one_node() -> None:
    batch = pack(tree_rows())
    assert len(batch.first) == 3 * (19 + 4 + 1 + 1)
    prefixes = [
        tuple(batch.token_ids[a : t + 1].tolist())
        for a, b in pairwise(batch.cu_seqlens.tolist())
        for t in range(a, b)
    ]
    node_of = dict(zip(prefixes, batch.nodes.tolist(), strict=True))
    assert [node_of[prefix] for prefix in prefixes] == batch.nodes.tolist()
    assert len(set(node_of.values())) == len(node_of) == len(batch.first)
    assert [prefixes[t] for t in batch.first.tolist()] == list(node_of)


def test_nodes_give_the_log_probs_of_the_rows_bit_for_bit_and_their_gradient() -> None:
    model = decoder()
    rows = tree_rows()
    batch = pack(rows)
    at = batch.targets
    plain = torch.cat(
        [
            x[18:] for x in score(model, [row.token_ids for row in rows])
        ]  # the targets of a row follow its prompt
    )
    logits = model.head(hidden_nodes(model, batch)[batch.nodes[at - 1]])
    ours, _ = ops.logprob(logits, batch.token_ids[at])
    assert torch.equal(ours, plain)
    weights = torch.randn(len(ours), generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (ours, plain)]
    for ours_grad, plain_grad in zip(*grads, strict=True):
        torch.testing.assert_close(
            ours_grad, plain_grad, rtol=1e-4, atol=1e-5 * float(plain_grad.abs().max())
        )


def test_rows_with_nothing_in_common_are_left_as_they_are() -> None:
    rows = [dataclasses.replace(row, token_ids=[i, *row.token_ids[1:]]) for i, row in enumerate(make_rows(4))]
    batch = pack(rows)
    assert batch.nodes.tolist() == batch.first.tolist() == list(range(len(batch.token_ids)))


@pytest.mark.parametrize(
    "given", [{}, {"temperature": 0.6}, {"temperature": 0.0}, {"top_p": 0.6, "temperature": 0.8}]
)
def test_restricted_draws_are_scored_as_training_scores_them(given: dict[str, float]) -> None:
    """What a callback allows is recorded as the support: the update's log-probs have the rollout's bits."""
    model = decoder(vocab_size=90, num_heads=2, num_kv_heads=1, head_dim=16)
    prompts = [[1, 2, 3], [4, 5], [6]]
    params = [
        SamplingParams(
            max_new_tokens=12,
            seed=i,
            **given,
            allow=lambda ids, i=i: range(i, 80, 7) if len(ids) % 2 or i == 1 else None,
        )
        for i in range(3)
    ]
    completions = Engine(model).generate(prompts, params)
    for i, c in enumerate(completions):
        assert all(t in range(i, 80, 7) for n, t in enumerate(c.token_ids) if n % 2 or i == 1)
    rows = []
    for i, (prompt, c) in enumerate(zip(prompts, completions, strict=True)):
        supports = Supports([0] * len(prompt) + c.supports.sizes, c.supports.ids)
        mask = [False] * len(prompt) + [True] * len(c.token_ids)
        logprobs = [0.0] * len(prompt) + c.logprobs
        rows.append(
            Row(
                token_ids=prompt + c.token_ids,
                loss_mask=mask,
                logprobs=logprobs,
                advantage=1.0,
                dialogue_id=i,
                role=0,
                supports=supports,
            )
        )
    batch = pack(rows)
    scored = trained_logprobs(model, batch, given.get("temperature", 1.0) or 1.0)
    assert scored.tolist() == [x for c in completions for x in c.logprobs]


def tree_by_dictionary(rows: list[Row]) -> tuple[list[int], list[int]]:
    """`nodes` and `first`, a token at a time: a node is its parent and its token."""
    children: dict[tuple[int, int], int] = {}
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


@pytest.mark.parametrize("letters", [1, 2, 3])
def test_the_tree_is_that_of_a_dictionary(letters: int) -> None:
    """Rows of few letters agree in many ways: some are beginnings of others, some are equal."""
    for seed in range(60):
        rng = random.Random(seed)
        texts = [
            [rng.randrange(letters) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 12))
        ]
        rows = [
            Row(
                token_ids=ids,
                loss_mask=[False] * len(ids),
                logprobs=[0.0] * len(ids),
                advantage=0.0,
                dialogue_id=i,
                role=0,
            )
            for i, ids in enumerate(texts)
        ]
        batch = pack(rows)
        assert (batch.nodes.tolist(), batch.first.tolist()) == tree_by_dictionary(rows), texts


def test_arrays_arrive_in_one_copy_as_they_were() -> None:
    """What a GPU gets: one buffer, and views of it; here without a GPU."""
    rng = np.random.default_rng(0)
    arrays = {
        "ids": rng.integers(0, 99, 7),
        "mask": rng.random(13) < 0.5,
        "empty": np.empty(0, np.int32),
        "table": rng.random((3, 5)).astype(np.float32),
        "last": np.array([2**40]),
    }
    buffer = transfer.joined(arrays, pin=False)
    for name, tensor in transfer.parts(buffer, arrays).items():
        assert tensor.dtype == torch.from_numpy(arrays[name]).dtype
        assert torch.equal(tensor, torch.from_numpy(arrays[name]))
        assert tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert {**transfer.to_device(arrays, torch.device("cpu"))}.keys() == arrays.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_many_rows_share_has_a_gradient_that_is_summed_in_fp32(dtype: torch.dtype) -> None:
    """A prefix of 2,000 rows: a sum in bf16 stops growing at some 256 of its terms."""
    draws = torch.Generator().manual_seed(0)
    numbers = torch.cat(
        [torch.zeros(2_000, dtype=torch.int64), torch.arange(1, 7), torch.ones(3, dtype=torch.int64)]
    )
    x = torch.randn(8, 2, 5, generator=draws).to(dtype).requires_grad_()
    grad = torch.rand(len(numbers), 2, 5, generator=draws).to(dtype)
    taken = gather.Index(numbers, 8).take(x)
    assert torch.equal(taken, x[numbers])
    (found,) = torch.autograd.grad(taken, x, grad)
    exact = torch.zeros(8, 2, 5, dtype=torch.float64).index_add_(0, numbers, grad.double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= bound * exact).all()
