"""The engine under random lives of many branches, against a plain model of what each one should hold."""

from __future__ import annotations

import random

import torch
from duologue.kernels import backend
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, score
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Request, SamplingParams
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

VOCAB, PAGE, PAGES = 101, 16, 24
MODEL = Decoder(
    ModelConfig(
        model_type="qwen3",
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
)
MODEL.init_weights(0)


class EngineLife(RuleBasedStateMachine):
    """Opens, forks, rewinds, turns, cancels and closes on a pool too small for all.

    The model is a list of ids per branch.
    """

    branches = Bundle("branches")

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(MODEL, cache_tokens=PAGE * PAGES, max_step_tokens=48, max_batch=5)
        self.expected: dict[Branch, list[int]] = {}
        self.requests: dict[Branch, Request] = {}
        self.scored: list[tuple[list[int], int, list[float]]] = []

    def new_ids(self, n: int, seed: int) -> list[int]:
        rng = random.Random(seed % 3)  # few seeds, so that contexts often begin alike
        return [rng.randrange(VOCAB) for _ in range(n)]

    @rule(target=branches, n=st.integers(1, 90), seed=st.integers(0, 5))
    def open(self, n: int, seed: int) -> Branch:
        ids = self.new_ids(n, seed)
        branch = self.engine.open(ids)
        self.expected[branch] = ids
        return branch

    @rule(target=branches, branch=branches)
    def fork(self, branch: Branch) -> Branch:
        self.finish()
        child = branch.fork(1)[0]
        self.expected[child] = list(self.expected[branch])
        return child

    @rule(branch=branches, n=st.integers(0, 40))
    def rewind(self, branch: Branch, n: int) -> None:
        self.finish()
        n = min(n, len(branch) - 1)
        branch.rewind(n)
        del self.expected[branch][len(branch) :]

    @rule(branch=branches, n=st.integers(1, 30), seed=st.integers(0, 5))
    def append(self, branch: Branch, n: int, seed: int) -> None:
        self.finish()
        branch.append(self.new_ids(n, seed))
        self.expected[branch] += self.new_ids(n, seed)

    @rule(branch=branches, n=st.integers(1, 12), seed=st.integers(0, 10**6))
    def start(self, branch: Branch, n: int, seed: int) -> None:
        if branch.request is None and len(branch) + n < 200:
            self.requests[branch] = self.engine.start(branch, SamplingParams(max_new_tokens=n, seed=seed))

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
        self.collect()

    @rule(branch=branches)
    def cancel(self, branch: Branch) -> None:
        if branch.request is not None:
            self.engine.cancel(branch.request)
        self.collect()

    @rule(branch=consumes(branches))
    def close(self, branch: Branch) -> None:
        self.finish()
        branch.close()
        del self.expected[branch]

    def finish(self) -> None:
        self.engine.run()
        self.collect()

    def collect(self) -> None:
        for branch, request in list(self.requests.items()):
            if request.done:
                completion = request.completion
                self.scored.append(
                    (
                        self.expected[branch] + completion.token_ids,
                        len(self.expected[branch]),
                        completion.logprobs,
                    )
                )
                self.expected[branch] += completion.token_ids
                del self.requests[branch]

    @invariant()
    def ids_are_what_they_should_be(self) -> None:
        for branch, ids in self.expected.items():
            if branch not in self.requests:
                assert branch.token_ids == ids

    @invariant()
    def every_page_is_held_or_free(self) -> None:
        pool = self.engine.pool
        held = [page for branch in self.expected for page in branch.pages]
        assert [pool.refcount[page] for page in range(PAGES)] == [held.count(page) for page in range(PAGES)]
        assert pool.n_free == PAGES - len(set(held))
        for branch in self.expected:
            assert len(branch.pages) == pool.pages_for(branch.n_cached) or branch.request is not None
            assert branch.n_cached <= len(branch.token_ids)

    @invariant()
    def pages_that_can_be_found_hold_what_their_key_says(self) -> None:
        found = {}
        for branch in self.expected:
            for i, page in enumerate(branch.pages[: branch.n_cached // PAGE]):
                before = branch.pages[i - 1] if i else -1
                found.setdefault(page, set()).add(
                    (before, tuple(branch.token_ids[i * PAGE : (i + 1) * PAGE]))
                )
        for page, keys in found.items():
            assert len(keys) == 1
            key = self.engine.pool._keys.get(page)
            assert key is None or key[1:] in keys

    def teardown(self) -> None:
        self.finish()
        for branch in list(self.expected):
            branch.close()
        assert self.engine.pool.n_free == PAGES
        assert not self.engine.pool._keys
        scored = [s for s in self.scored if s[2]]
        for (_, start, logprobs), exact in zip(
            scored, score(MODEL, [ids for ids, _, _ in scored]) if scored else [], strict=True
        ):
            got, want = torch.tensor(logprobs), exact.detach()[start - 1 :]
            assert torch.equal(got, want) if backend.available() else torch.allclose(got, want, atol=1e-4)


TestEngineLife = EngineLife.TestCase
TestEngineLife.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
