"""The rollout engine against transformers; its log-probs are those of the training forward, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duologue.kernels import backend
from duologue.model.checkpoint import load_weights
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, score
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import Completion, SamplingParams

VOCAB = 101


def make_model(
    family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 4.0
) -> Decoder:
    """A tiny decoder whose logits are far enough apart that sampling is not uniform."""
    config = ModelConfig(
        model_type=family,
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        qkv_bias=family == "qwen2",
    )
    model = Decoder(config)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model.to(dtype)


def make_prompts(n: int, seed: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def differing(model: Decoder, prompts: list[list[int]], completions: list[Completion]) -> int:
    """Tokens whose recorded log-prob is not the training forward's, bit for bit."""
    whole = [p + c.token_ids for p, c in zip(prompts, completions, strict=True)]
    scored = score(model, whole)
    return sum(
        int((torch.tensor(c.logprobs) != s.detach()[len(p) - 1 :]).sum())
        for p, c, s in zip(prompts, completions, scored, strict=True)
    )


needs_cpp = pytest.mark.skipif(
    not backend.available(), reason="bitwise equality is a promise of the C++ kernels, which are not built"
)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_equals_transformers_generate(family: str, tmp_path: Path) -> None:
    import transformers

    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    make_config, make = kinds[family]
    extra = {"head_dim": 16} if family == "qwen3" else {}
    torch.manual_seed(0)
    theirs = make(
        make_config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            **extra,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    from duologue.model.checkpoint import read_config

    model = Decoder(read_config(tmp_path))
    load_weights(model, tmp_path, "cpu", torch.float32)
    prompts = make_prompts(6, seed=1)
    ours = Engine(model).generate(prompts, SamplingParams(max_new_tokens=24, temperature=0))
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert completion.token_ids == expected.tolist()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_batch", [1, 3, 64])
def test_logprobs_equal_the_training_forward(dtype: torch.dtype, max_batch: int) -> None:
    model = make_model(dtype=dtype)
    prompts = make_prompts(20, seed=2)
    engine = Engine(model, max_batch=max_batch, max_step_tokens=37)  # chunked prefill among decodes
    completions = engine.generate(
        prompts, SamplingParams(max_new_tokens=21, temperature=1.0, stop_token_ids=(3,))
    )
    assert differing(model, prompts, completions) == 0


@needs_cpp
def test_preemption_changes_nothing() -> None:
    model = make_model()
    prompts = make_prompts(24, seed=3)
    params = SamplingParams(max_new_tokens=60, seed=5)
    roomy, tight = Engine(model), Engine(model, cache_tokens=160, max_step_tokens=64)
    expected = roomy.generate(prompts, params)
    got = tight.generate(prompts, params)
    assert tight.stats.preemptions > 0
    assert [(c.token_ids, c.logprobs) for c in got] == [(c.token_ids, c.logprobs) for c in expected]
    assert differing(model, prompts, got) == 0
    assert tight.pool.n_free == tight.pool.n_pages


@needs_cpp
def test_several_turns_with_forks_and_rewind_stay_exact() -> None:
    model = make_model()
    engine = Engine(model)
    rng = random.Random(0)
    base = engine.open([rng.randrange(VOCAB) for _ in range(37)])
    engine.prefill([base])
    branches = [base, *base.fork(5)]
    marks: list[list[tuple[int, Completion]]] = [[] for _ in branches]
    for turn in range(6):
        for i, branch in enumerate(branches):
            branch.append([rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))])
            at = len(branch)
            marks[i].append((at, branch.generate(SamplingParams(max_new_tokens=11, seed=100 * turn + i))))
        if turn == 3:  # take back half of the last reply, on a context that others share pages of
            branches[2].rewind(6)
            marks[2].pop()
    for branch, turns in zip(branches, marks, strict=True):
        scored = score(model, [branch.token_ids])[0].detach()
        for at, completion in turns:
            n = len(completion.token_ids)
            assert branch.token_ids[at : at + n] == completion.token_ids
            assert torch.equal(torch.tensor(completion.logprobs), scored[at - 1 : at - 1 + n])
    for branch in branches:
        branch.close()
    assert engine.pool.n_free == engine.pool.n_pages


def test_a_seeded_draw_does_not_depend_on_its_batch() -> None:
    model = make_model()
    prompts = make_prompts(9, seed=4)
    params = [SamplingParams(max_new_tokens=15, seed=i) for i in range(9)]
    together = Engine(model).generate(prompts, params)
    alone = [Engine(model).generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    backwards = Engine(model, max_batch=4).generate(prompts[::-1], params[::-1])[::-1]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone] == [c.token_ids for c in backwards]
    assert len({tuple(c.token_ids) for c in together}) > 1


def test_unseeded_requests_differ_and_stop_tokens_end_them() -> None:
    model = make_model(spread=0.1)  # nearly uniform, so that every stop token comes soon
    completions = Engine(model).generate(
        [[1]] * 8, SamplingParams(max_new_tokens=200, stop_token_ids=(3, 4, 5))
    )
    assert len({tuple(c.token_ids) for c in completions}) == 8
    for c in completions:
        assert c.finish_reason == "stop"
        assert c.token_ids[-1] in (3, 4, 5)
        assert not set(c.token_ids[:-1]) & {3, 4, 5}
        assert len(c.token_ids) == len(c.logprobs) == len(c.entropies)


def test_seeded_requests_in_between_change_no_draw() -> None:
    """So that an engine can be lent: whoever borrows it gives seeds, as arenas do."""
    model, unseeded = make_model(), SamplingParams(max_new_tokens=12)
    alone, lent = Engine(model), Engine(model)
    expected = [alone.generate([[1, 2]], unseeded) for _ in range(2)]
    first = lent.generate([[1, 2]], unseeded)
    lent.generate(make_prompts(7, seed=6), SamplingParams(max_new_tokens=9, seed=5, top_p=0.8), n=2)
    assert [first, lent.generate([[1, 2]], unseeded)] == expected
    assert expected[0] != expected[1]


@pytest.mark.parametrize("how", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_of_torchs_optimizers_is_noticed(kind: type[torch.optim.Optimizer], how: str) -> None:
    """A fused step is what torch itself does not count."""
    model = make_model()
    engine = Engine(model)
    settings = {} if how == "for-loop" else {how: True}
    optimizer = kind(model.parameters(), lr=0.05, **settings)  # type: ignore[call-arg]
    branch = engine.open([1, 2, 3, 4] * 10)
    branch.generate(SamplingParams(max_new_tokens=2, seed=1))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    found = branch.generate(SamplingParams(max_new_tokens=5, seed=2))
    assert found.weights_version == 1
    fresh = Engine(model).open(branch.token_ids[:-5]).generate(SamplingParams(max_new_tokens=5, seed=2))
    assert (fresh.token_ids, fresh.logprobs) == (found.token_ids, found.logprobs)


def test_an_error_in_a_step_leaves_nothing_behind() -> None:
    """What it was raised for goes on with another call; what others asked for is worked on."""
    said: list[str] = []

    def decode(ids: list[int]) -> str:
        if not said:
            said.append("once")
            raise KeyboardInterrupt
        return ""

    engine = Engine(make_model(), decode=decode, cache_tokens=64)
    branch = engine.open([1, 2, 3])
    stops = SamplingParams(max_new_tokens=4, stop_strings=("x",), seed=0)
    with pytest.raises(KeyboardInterrupt):
        branch.generate(stops)
    assert branch.generate(stops).finish_reason == "length"
    other = engine.start(engine.open([4, 5]), SamplingParams(max_new_tokens=3, seed=1))
    with pytest.raises(ValueError, match="the KV pool"):
        engine.generate([[1], [1] * 100], SamplingParams())
    short, long = engine.open([1, 2]), engine.open([1] * 100)
    with pytest.raises(ValueError, match="the KV pool"):
        engine.prefill([short, long])
    assert not short.request
    engine.run()
    assert other.done
    assert len(other.completion.token_ids) == 3
    dropped = engine.start(short, SamplingParams(max_new_tokens=3))
    engine.abort()
    assert dropped.done
    assert dropped.completion.finish_reason == "cancelled"
    engine.cancel(dropped)
    for each in [*engine._branches]:
        each.close()  # type: ignore[attr-defined]
    engine.release_memory()
    assert engine.pool.n_free == engine.pool.n_pages


@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor])
def test_ids_may_be_an_array_or_a_tensor(form: Any) -> None:
    engine = Engine(make_model())
    ids, more, allowed = [1, 2, 3, 4], [5, 6], [7, 8, 9]
    expected, found = engine.open(ids), engine.open(form(ids))
    assert found.token_ids == ids
    expected.append(more)
    found.append(form(more))
    a = expected.generate(SamplingParams(max_new_tokens=6, seed=0, allow=lambda _: allowed))
    for answer in (form(allowed), set(allowed), dict.fromkeys(allowed).keys()):
        b = found.generate(SamplingParams(max_new_tokens=6, seed=0, allow=lambda _, x=answer: x))
        assert not b.error
        assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
        found.rewind(6)


def test_new_weights_are_noticed_and_old_kv_is_never_hit() -> None:
    model = make_model()
    engine = Engine(model)
    branch = engine.open([1, 2, 3, 4] * 10)
    first = branch.generate(SamplingParams(max_new_tokens=5, seed=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second = branch.generate(SamplingParams(max_new_tokens=5, seed=2))
    assert (first.weights_version, second.weights_version) == (0, 1)
    fresh = Engine(model).open(branch.token_ids[:-5]).generate(SamplingParams(max_new_tokens=5, seed=2))
    assert (fresh.token_ids, fresh.logprobs) == (second.token_ids, second.logprobs)


def test_an_update_during_a_request_is_refused() -> None:
    model = make_model()
    engine = Engine(model)
    engine.start(engine.open([1, 2]), SamplingParams(max_new_tokens=9))
    engine.step()
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weights changed while requests were in flight"):
        engine.step()
    engine.abort()
    assert not engine.busy


def test_forks_share_full_pages() -> None:
    engine = Engine(make_model())
    base = engine.open([7] * 40)
    engine.prefill([base])
    used = engine.pool.n_pages - engine.pool.n_free
    base.fork(8)
    assert used == 3
    assert (
        engine.pool.n_pages - engine.pool.n_free == used + 8
    )  # two pages shared, the partly filled third copied


def test_random_life_of_branches_leaks_no_page() -> None:
    """Opens, forks, rewinds, turns and closes in random order on a pool that is too small for all of them."""
    model = make_model()
    engine = Engine(model, cache_tokens=640, max_step_tokens=96)
    rng = random.Random(1)
    branches = [engine.open([1, 2, 3])]
    for _ in range(250):
        branch = rng.choice(branches)
        action = rng.choice(["open", "fork", "rewind", "turn", "turn", "append", "close"])
        if action == "open":
            branches.append(engine.open([rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))]))
        elif action == "fork" and len(branches) < 24:
            branches += branch.fork(rng.randint(1, 3))
        elif action == "rewind":
            branch.rewind(rng.randint(0, len(branch) - 1))
        elif action == "append":
            branch.append([rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))])
        elif action == "turn" and len(branch) < 200:
            branch.generate(SamplingParams(max_new_tokens=rng.randint(1, 12)))
        elif action == "close" and len(branches) > 1:
            branch.close()
            branches.remove(branch)
        held = [page for b in branches for page in b.pages]
        assert all(engine.pool.refcount[page] == held.count(page) for page in set(held))
        assert engine.pool.n_free == engine.pool.n_pages - len(set(held))
        assert all(engine.pool.pages_for(b.n_cached) == len(b.pages) for b in branches)
    for branch in branches:
        branch.close()
    assert engine.pool.n_free == engine.pool.n_pages
    assert engine.stats.evictions > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda e: e.generate([[1, 2]], SamplingParams(max_new_tokens=511)),
            "2 tokens and max_new_tokens 511 exceed the model's",
        ),
        (
            lambda e: e.generate([[1] * 300], SamplingParams(max_new_tokens=9)),
            r"the KV pool \(rollout.cache_tokens\), which holds 256",
        ),
        (
            lambda e: e.generate([[1, VOCAB]], SamplingParams()),
            f"token id {VOCAB} is outside the vocabulary: accepted is 0 to 100",
        ),
        (lambda e: e.generate([[]], SamplingParams()), "an empty branch cannot generate"),
        (lambda e: e.generate([[1]], [SamplingParams()] * 2), "1 prompts but 2 SamplingParams"),
        (lambda e: e.open([1]).rewind(2), "n_tokens = 2, accepted is 0 to 1"),
        (lambda e: SamplingParams(top_p=0.0), r"top_p = 0.0: accepted is a number in \(0, 1\]"),
        (lambda e: SamplingParams(temperature=0, top_k=5), "contradicts top_k"),
        (lambda e: Engine(e.model, page_size=12), "page_size = 12: accepted is a multiple of 16"),
        (lambda e: Engine(e.model, cache_tokens=3), "cache_tokens = 3"),
    ],
)
def test_bad_input_is_named(make: object, message: str) -> None:
    engine = Engine(make_model(), cache_tokens=256)
    with pytest.raises(ValueError, match=message):
        make(engine)  # type: ignore[operator]
    assert engine.pool.n_free == engine.pool.n_pages
    assert not engine.busy


def test_a_closed_or_busy_branch_is_refused() -> None:
    engine = Engine(make_model())
    branch = engine.open([1])
    engine.start(branch, SamplingParams(max_new_tokens=4))
    with pytest.raises(RuntimeError, match="is generating"):
        branch.append([2])
    engine.run()
    branch.close()
    branch.close()
    with pytest.raises(RuntimeError, match="is closed"):
        branch.generate(SamplingParams())


def test_a_pool_that_does_not_fit_says_what_it_takes() -> None:
    with pytest.raises(MemoryError, match=r"rollout.cache_tokens"):
        Engine(make_model(), cache_tokens=2**44)


def test_equal_prompts_are_computed_once() -> None:
    model, prompt = make_model(), list(range(70))
    engine = Engine(model)
    params = SamplingParams(max_new_tokens=20, seed=7)
    together = engine.generate([prompt, [5, 6], prompt[:50] + [1] * 9], params, n=4)
    alone = [
        Engine(model).generate([p], SamplingParams(max_new_tokens=20, seed=7 + i))[0]
        for p in (prompt, [5, 6], prompt[:50] + [1] * 9)
        for i in range(4)
    ]
    assert [(c.token_ids, c.logprobs) for c in together] == [(c.token_ids, c.logprobs) for c in alone]
    # of the long prompt four pages, and of its variant the three that agree
    assert engine.stats.shared_tokens == 3 * 64 + 4 * 48
    assert engine.stats.prefill_tokens == 4 * (70 + 2 + 59) - engine.stats.shared_tokens
    assert engine.pool.n_free == engine.pool.n_pages


def test_a_rewritten_page_is_not_found() -> None:
    model = make_model()
    engine = Engine(model)
    first = engine.open([3] * 33)
    engine.prefill([first])
    first.rewind(20)
    first.append([4] * 30)
    reply = first.generate(SamplingParams(max_new_tokens=4, seed=1))
    second = engine.open([3] * 33)
    got = second.generate(SamplingParams(max_new_tokens=4, seed=1))
    fresh = Engine(model)
    for ids, completion in (([3] * 13 + [4] * 30, reply), ([3] * 33, got)):
        expected = fresh.generate([ids], SamplingParams(max_new_tokens=4, seed=1))[0]
        assert (completion.token_ids, completion.logprobs) == (expected.token_ids, expected.logprobs)


def test_long_requests_are_admitted_first_and_idle_places_counted() -> None:
    engine = Engine(make_model(), max_batch=2)
    requests = [engine.start(engine.open([1]), SamplingParams(max_new_tokens=n)) for n in (2, 3, 9)]
    order = []
    while engine.busy:
        order += [requests.index(r) for r in engine.step()]
    assert order == [1, 0, 2]  # the longest started at once, beside the second longest
    assert engine.stats.slot_steps == 18
    assert engine.stats.idle_slot_steps == 18 - (2 + 3 + 9)


def test_cancel_frees_the_place() -> None:
    engine = Engine(make_model(), max_batch=2, decode_steps=1)
    requests = [engine.start(engine.open([1, 2]), SamplingParams(max_new_tokens=30)) for _ in range(3)]
    for _ in range(5):
        engine.step()
    engine.cancel(requests[0])
    engine.cancel(requests[2])
    engine.run()
    assert [r.completion.finish_reason for r in requests] == ["cancelled", "length", "cancelled"]
    assert [len(r.completion.token_ids) for r in requests] == [5, 30, 0]


def test_stop_strings_end_a_completion_by_its_text() -> None:
    def decode(ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)

    model = make_model(spread=0.1)
    params = [SamplingParams(max_new_tokens=300, seed=i, stop_strings=("ab", "q")) for i in range(6)]
    for completion in Engine(model, decode=decode).generate([[1]] * 6, params):
        text = decode(completion.token_ids)
        assert completion.finish_reason == "stop"
        assert text.endswith(("ab", "q"))
        assert "ab" not in text[:-1]
        assert "q" not in text[:-1]
    with pytest.raises(ValueError, match="stop_strings need an engine with a decode function"):
        Engine(model).generate([[1]], params[:1])


def test_allowed_tokens_and_a_callback_that_fails() -> None:
    model = make_model(spread=0.1)

    def even(ids: list[int]) -> list[int]:
        return list(range(0, VOCAB, 2)) if len(ids) % 2 else [7, 9]

    def broken(ids: list[int]) -> list[int]:
        if len(ids) == 3:
            raise KeyError("no such state")
        return [5]

    prompts, plain = [[1], [2], [3], [4]], SamplingParams(max_new_tokens=12, seed=1)
    params = [SamplingParams(max_new_tokens=12, seed=1, allow=f) for f in (even, broken, lambda _: [])]
    restricted, failed, empty, other = Engine(model).generate(prompts, [*params, plain])
    for i, token in enumerate(restricted.token_ids):
        assert token in even([0] * i)
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0] + restricted.token_ids]))[0]
    for i, (token, logprob) in enumerate(zip(restricted.token_ids, restricted.logprobs, strict=True)):
        allowed = even([0] * i)
        expected = logits[i][allowed].double().log_softmax(0)[allowed.index(token)]
        assert logprob == pytest.approx(float(expected), abs=1e-5)
    assert (failed.finish_reason, failed.token_ids) == ("error", [5, 5, 5])
    assert "KeyError: 'no such state'" in failed.error
    assert (empty.finish_reason, empty.token_ids) == ("error", [])
    assert other.token_ids == Engine(model).generate([[4]], plain)[0].token_ids
