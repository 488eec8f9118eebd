"""A completion that must be one of some sequences: it is, and its log-probs are those of the softmax over
what was left to choose from, in sampling and in training alike.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from duologue.grpo.loss import LossConfig
from duologue.grpo.packing import Row
from duologue.grpo.update import accumulate_policy_gradient
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams
from duologue.rollout.engine.trie import TokenTrie
from tiny import decoder

STOP = 39
SEQUENCES = [[5, STOP], [5, 6, STOP], [7, 8, 9, STOP], [7, 8, 10, STOP]]
PROMPT = [1, 2, 3]


def test_what_may_follow() -> None:
    trie = TokenTrie(SEQUENCES)
    assert trie.longest == 4
    following = {(): [5, 7], (5,): [6, STOP], (7,): [8], (7, 8): [9, 10], (7, 8, 9): [STOP]}
    assert {drawn: trie(list(drawn)) for drawn in following} == following
    with pytest.raises(ValueError, match="at least one sequence"):
        TokenTrie([])
    with pytest.raises(ValueError, match="at least one id"):
        TokenTrie([[3], []])


def test_draws_are_of_the_sequences_with_the_renormalised_log_probs() -> None:
    """Against the softmax in float64 over the ids that were allowed; beside free rows, whose draws stay."""
    model, trie = decoder(), TokenTrie(SEQUENCES)
    engine = Engine(model, cache_tokens=4096)
    held = [
        SamplingParams(seed=i, allow=trie, stop_token_ids=(STOP,), max_new_tokens=trie.longest, temperature=t)
        for i, t in enumerate([1.0] * 40 + [0.7] * 20)
    ]
    free = SamplingParams(seed=5, max_new_tokens=4)
    *drawn, beside = engine.generate([PROMPT] * 61, [*held, free])
    alone = engine.generate([PROMPT], free)[0]
    assert (beside.token_ids, beside.logprobs) == (alone.token_ids, alone.logprobs)
    counts = Counter(tuple(c.token_ids) for c in drawn)
    assert counts.keys() == {tuple(s) for s in SEQUENCES}
    exact = decoder().double()
    for completion, params in zip(drawn, held, strict=True):
        assert completion.finish_reason == "stop"
        ids = completion.token_ids
        logits = exact(torch.tensor([PROMPT + ids]))[0, len(PROMPT) - 1 :].detach() / params.temperature
        for i, token in enumerate(ids):
            allowed = trie(ids[:i])
            expected = logits[i][allowed].log_softmax(0)[allowed.index(token)]
            assert abs(completion.logprobs[i] - float(expected)) < 1e-5
        assert completion.supports.sizes == [len(trie(ids[:i])) for i in range(len(ids))]


def test_training_sees_the_bits_of_sampling() -> None:
    model, trie = decoder(), TokenTrie(SEQUENCES)
    engine = Engine(model, cache_tokens=4096)
    params = SamplingParams(seed=2, allow=trie, stop_token_ids=(STOP,), max_new_tokens=trie.longest)
    rows = []
    for i, c in enumerate(engine.generate([PROMPT], params, n=12)):
        n = len(c.token_ids)
        supports = type(c.supports)([0] * len(PROMPT), c.supports.ids[:0])
        supports.extend(c.supports)
        rows.append(
            Row(
                token_ids=PROMPT + c.token_ids,
                loss_mask=[False] * len(PROMPT) + [True] * n,
                logprobs=[0.0] * len(PROMPT) + c.logprobs,
                supports=supports,
                advantage=(-1.0) ** i,
                dialogue_id=i,
                role=0,
            )
        )
    stats = accumulate_policy_gradient(model, rows, LossConfig(), temperature=1.0, max_tokens=100)
    assert stats.metrics()["mismatch"] == 0.0
