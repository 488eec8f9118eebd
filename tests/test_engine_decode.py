"""Several steps per host sync give what single steps give, bit for bit; groups; and the pool's memory."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.rollout.engine import buckets, decode_gpu, runner
from duologue.rollout.engine.attention import shared_groups
from duologue.rollout.engine.decode_cpu import NativeLoop
from duologue.rollout.engine.decode_gpu import DeviceLoop
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import Completion, SamplingParams

V = 307


@pytest.fixture(params=["one call", "on the device"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Both kinds of loop: the one for CUDA runs on CPU where the C++ kernels do not take whole layers."""
    if request.param == "one call":
        return NativeLoop
    monkeypatch.setattr(Decoder, "paged_layers", lambda self: None)
    return decode_gpu.DeviceLoop


def make_model() -> Decoder:
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=V,
        hidden_size=48,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    )
    model = Decoder(config)
    model.init_weights(0)
    return model


def work(seed: int, n: int = 24) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(seed)
    prompts, params = [], []
    for i in range(n):
        prompts.append([rng.randrange(V) for _ in range(rng.randint(1, 70))])
        given: dict[str, Any] = {
            "max_new_tokens": rng.randint(1, 40),
            "seed": i,
            "temperature": rng.choice([0.0, 0.6, 1.0]),
        }
        if i % 3 == 0 and given["temperature"]:
            given |= rng.choice([{"top_p": 0.4}, {"top_k": 9}, {"min_p": 0.2}, {"top_p": 0.9, "top_k": 50}])
        params.append(
            SamplingParams(**given, stop_token_ids=tuple(rng.sample(range(V), rng.choice([0, 4, 16]))))
        )
    return prompts, params


def drawn(completions: list[Completion]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.logprobs, c.entropies, c.supports, c.finish_reason) for c in completions]


@pytest.mark.parametrize(("steps", "tokens"), [(2, 4096), (8, 4096), (8, 640), (33, 65_536)])
@pytest.mark.parametrize("seed", range(3))
def test_completions_do_not_depend_on_steps_ahead(loop: type, seed: int, steps: int, tokens: int) -> None:
    """Mixed lengths, stops, truncation and greedy rows, chunked prefill in between; a small pool preempts."""
    model = make_model()
    prompts, params = work(seed)
    plain = Engine(model, max_batch=11, max_step_tokens=64, decode_steps=1).generate(prompts, params)
    ahead = Engine(model, max_batch=11, max_step_tokens=64, cache_tokens=tokens, decode_steps=steps)
    assert isinstance(ahead._runner.loop, loop)
    assert drawn(ahead.generate(prompts, params)) == drawn(plain)
    assert ahead.pool.n_free == ahead.pool.n_pages
    assert ahead.stats.decode_tokens + ahead.stats.prefill_tokens >= sum(len(c.token_ids) for c in plain)


def test_a_support_that_does_not_fit_is_drawn_by_a_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "SUPPORT_IDS", 5)
    monkeypatch.setattr(Decoder, "paged_layers", lambda self: None)
    model = make_model()
    prompts = [[1, 2, 3], [4], [5, 6]]
    params = [
        SamplingParams(max_new_tokens=30, seed=i, top_p=0.5) for i in range(3)
    ]  # about half of 307 ids, never 5
    ahead = Engine(model, decode_steps=8).generate(prompts, params)
    assert drawn(ahead) == drawn(Engine(model, decode_steps=1).generate(prompts, params))
    assert min(min(c.supports.sizes) for c in ahead) > 5


@pytest.mark.usefixtures("loop")
def test_dialogues_go_on_where_a_loop_ended() -> None:
    """Turns, forks, an update in between and callbacks, on two engines that differ in nothing else."""
    found = []
    for steps in (1, 6):
        model = make_model()
        engine = Engine(model, decode_steps=steps)
        branch = engine.open(list(range(40)))
        engine.prefill([branch])
        twins = branch.fork(3)
        requests = [engine.start(b, SamplingParams(max_new_tokens=20, seed=i)) for i, b in enumerate(twins)]
        engine.run()
        results = [r.completion for r in requests]
        twins[0].append([7, 8, 9])
        twins[1].rewind(5)
        results += [twins[i].generate(SamplingParams(max_new_tokens=9, seed=5 + i)) for i in range(2)]
        results.append(
            twins[2].generate(SamplingParams(max_new_tokens=9, seed=7, allow=lambda ids: [3, 4, 5]))
        )
        engine.release_memory()
        with torch.no_grad():
            model.head_weight.mul_(1.01)
        results.append(twins[0].generate(SamplingParams(max_new_tokens=9, seed=8)))
        found.append(drawn(results))
        for b in (branch, *twins):
            b.close()
        assert engine.pool.n_free == engine.pool.n_pages
    assert found[0] == found[1]


def test_one_call_ends_with_the_first_stop_and_says_what_is_out_of_range() -> None:
    model = make_model()
    params = [SamplingParams(max_new_tokens=40, seed=i) for i in range(4)]
    plain = Engine(model, decode_steps=1).generate([[1, 2]] * 4, params)
    stop = plain[2].token_ids[9]
    engine = Engine(model, decode_steps=30)
    for i in range(4):
        engine.start(engine.open([1, 2]), SamplingParams(max_new_tokens=40, seed=i, stop_token_ids=(stop,)))
    engine.step()  # the prompts
    running = engine._scheduler.running
    assert [len(r.completion.token_ids) for r in running] == [1] * 4
    engine.step()
    first = min(c.token_ids.index(stop) for c in plain if stop in c.token_ids)
    assert {len(r.completion.token_ids) for r in running} == {first + 1}
    layers, kv = engine._runner.layers, engine._runner.kv
    assert layers is not None
    ones, none = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    settings = ones, none, ones, torch.zeros(1), torch.tensor([3]), torch.tensor([17])
    table = torch.zeros(1, 1, dtype=torch.int32)  # one page, and the token is the seventeenth
    with pytest.raises(ValueError, match="one is not in its range"):
        layers.decode(
            model.head_weight,
            settings,
            torch.tensor([5]),
            *model.rotary_tables(torch.tensor([17])),
            kv,
            table,
            [()],
            4,
        )


def test_rows_of_one_adapter_go_ahead_and_mixed_ones_do_not() -> None:
    found = []
    for steps in (1, 5):
        base = make_model()
        policy = LoraDecoder(
            base, new_adapter(base, LoraSettings(rank=3, alpha=6.0, targets=("q_proj", "up_proj")), 0)
        )
        for p in policy.adapter.parameters():
            p.data.normal_(generator=torch.Generator().manual_seed(p.numel()), std=0.2)
        engine = Engine(policy, decode_steps=steps)
        engine.use_adapters([None])
        branches = [engine.open([i + 1, 5, 9], adapter=i % 2) for i in range(4)]
        results = [b.generate(SamplingParams(max_new_tokens=12, seed=3)) for b in branches]
        requests = [engine.start(b, SamplingParams(max_new_tokens=12, seed=4)) for b in branches]
        engine.run()
        found.append(drawn(results + [r.completion for r in requests]))
    assert found[0] == found[1]


def test_memory_is_given_back_and_taken_again() -> None:
    engine = Engine(make_model(), cache_tokens=512, decode_steps=4)
    branch = engine.open([1, 2, 3])
    first = branch.generate(SamplingParams(max_new_tokens=8, seed=1))
    engine.release_memory()
    assert engine._runner._kv is None
    branch.rewind(8)
    assert drawn([branch.generate(SamplingParams(max_new_tokens=8, seed=1))]) == drawn([first])


def test_a_measured_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    assert Engine(model, cache_tokens=None).pool.n_pages * 16 == 65_536
    of_token = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, head dim, bytes
    assert runner.token_bytes(model) == of_token
    cuda = torch.device("cuda:0")

    weight = SimpleNamespace(device=cuda, element_size=lambda: 4)
    fake: Any = SimpleNamespace(
        config=model.config, model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for free, tokens in ((10**6, int(0.85 * 10**6) // of_token // 16 * 16), (9_000, None)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2 * free))
        if tokens is None:
            with pytest.raises(
                MemoryError, match=r"GiB are free on cuda:0, not enough for one page .* rollout.cache_tokens"
            ):
                runner.measured_tokens(fake, 16)
        else:
            assert runner.measured_tokens(fake, 16) == tokens


def groups_of(
    pages: list[list[int]], cached: list[int], size: int, rows: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """With -1 in the table behind a row's last page."""
    width = max(map(len, pages))
    table = np.array([[*ids, *[-1] * (width - len(ids))] for ids in pages])
    return shared_groups(table, np.array(cached), size, rows)


def test_shared_groups_are_what_the_tables_say() -> None:
    """Against a comparison of every row with its neighbour, page by page."""
    rng = random.Random(0)
    for _ in range(300):
        n, size = rng.randint(1, 9), 16
        stems = [[rng.randrange(1000) for _ in range(40)] for _ in range(3)]
        pages = [[*rng.choice(stems)[: rng.randint(1, 40)], 2000 + i] for i in range(n)]
        pages.sort()
        cached = [rng.randint(0, len(p) * size) for p in pages]
        rows = n + rng.randint(0, 3)
        found = groups_of(pages, cached, size, rows)
        if found is None:
            found = np.arange(rows + 1), np.zeros(rows, dtype=int)
        starts, shared = found
        assert len(starts) == rows + 1
        assert starts[0] == 0
        assert starts[-1] == rows
        assert (np.diff(starts) >= 0).all()
        for i in range(rows):
            members = range(starts[i], min(starts[i + 1], n))
            if shared[i]:
                assert len(members) > 1
                assert shared[i] >= 512
                assert shared[i] % size == 0
                heads = {tuple(pages[m][: shared[i] // size]) for m in members}
                assert len(heads) == 1
                assert all(shared[i] <= cached[m] for m in members)


def test_neighbours_that_share_two_chunks_are_one_group() -> None:
    common = list(range(32))
    starts, shared = groups_of(
        [[*common, 40], [*common, 41], [50], [*common, 42]], [520, 600, 3, 520], 16, 6
    ) or ([], [])
    assert list(starts) == [0, 2, 3, 4, 5, 6, 6]
    assert list(shared) == [512, 0, 0, 0, 0, 0]


# ---- a device that is behind -------------------------------------------------------------------------------


class Late:
    """The reading of a queued device: the steps before it run when somebody waits for it, and no more."""

    def __init__(self, queue: Queue, bucket: buckets.Bucket, steps: tuple[int, int]) -> None:
        self.queue = queue
        self.reading: Any = None
        queue.put(partial(self.read, bucket, steps))
        self.end = queue.n_put

    def read(self, bucket: buckets.Bucket, steps: tuple[int, int]) -> None:
        self.reading = self.queue.send(bucket, *steps)

    def wait(self) -> None:
        self.queue.run_to(self.end)

    def decoded(self, *rows: Any) -> Any:
        self.wait()
        return self.reading.decoded(*rows)


class Queue:
    """What the loop launches waits here, as it would in a CUDA stream, until the host asks for its outcome or
    launches something else.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
        self.todo: list[Any] = []
        self.n_put = self.n_run = self.overlaps = 0
        fill, self.send = buckets.Bucket.fill, buckets.Bucket.send
        step_of = DeviceLoop._step_of

        def filled(bucket: Any, *arguments: Any) -> None:
            self.overlaps += bool(self.todo)
            self.put(partial(fill, bucket, *arguments))

        def behind(launch: Any) -> Any:
            def launched(*arguments: Any) -> Any:
                self.overlaps += bool(self.todo)
                self.run_to(self.n_put)
                return launch(*arguments)

            return launched

        monkeypatch.setattr(Decoder, "paged_layers", lambda self: None)
        monkeypatch.setattr(decode_gpu, "HELD", held)
        monkeypatch.setattr(buckets.Bucket, "fill", filled)
        monkeypatch.setattr(buckets.Bucket, "send", lambda b, *steps: Late(self, b, steps))
        monkeypatch.setattr(DeviceLoop, "_step_of", lambda *a: partial(self.put, step_of(*a)))
        monkeypatch.setattr(DeviceLoop, "_captured", lambda loop, bucket, step: step)
        for name in ("execute", "copy_page", "release_memory"):
            monkeypatch.setattr(runner.Runner, name, behind(getattr(runner.Runner, name)))

    def put(self, launch: Any) -> None:
        self.todo.append(launch)
        self.n_put += 1

    def run_to(self, end: int) -> None:
        with torch.no_grad():
            while self.n_run < end:
                self.n_run += 1
                self.todo.pop(0)()


def queued(engine: Engine) -> Engine:
    """Its loop as on CUDA."""
    loop: Any = engine._runner.loop
    loop.capture, loop.held = True, decode_gpu.HELD
    return engine


@pytest.mark.parametrize(("held", "steps", "tokens"), [(2, 8, 4096), (1, 2, 256), (7, 8, 256), (3, 5, 1024)])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_launched_before_the_last_was_read(
    seed: int, held: int, steps: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed lengths, stops, truncation, preemption; on a device whose steps run when they are waited for."""
    model = make_model()
    prompts, params = work(seed)
    plain = drawn(Engine(model, max_batch=11, max_step_tokens=64, decode_steps=1).generate(prompts, params))
    queue = Queue(monkeypatch, held)
    monkeypatch.setattr(buckets, "SUPPORT_IDS", 40)  # so that plain steps come between
    engine = queued(Engine(model, max_batch=11, max_step_tokens=64, cache_tokens=tokens, decode_steps=steps))
    assert drawn(engine.generate(prompts, params)) == plain
    assert queue.overlaps > 5
    assert engine.pool.n_free == engine.pool.n_pages
    assert engine.stats.preemptions > 0 or tokens > 256
    assert not any(r.ahead for flight in engine._runner.loop._flights.values() for r in flight.rows)


def turns(engine: Engine, seed: int, cancelled: int) -> list[tuple[Any, ...]]:
    """Twelve dialogues of four turns, whose next turn is asked for as soon as one is there; forks among them.

    Some rows are guided, stop at strings or want candidates. One request is cancelled after so many steps of
    the engine, then drawn again.
    """
    rng = random.Random(seed)
    how = [[kind_of(rng) for _ in range(4)] for _ in range(12)]
    words = [[[rng.randrange(V) for _ in range(rng.randint(1, 30))] for _ in range(4)] for _ in range(12)]
    branches = [engine.open(words[i % 3][0] + words[i][0]) for i in range(12)]
    found: dict[tuple[int, int], Completion] = {}
    live = {i: (0, engine.start(branches[i], how[i][0])) for i in range(12)}
    n_steps = 0
    while live:
        engine.step()
        n_steps += 1
        if n_steps == cancelled and 5 in live:
            turn, request = live[5]
            engine.cancel(request)
            branches[5].rewind(len(request.completion.token_ids))
            live[5] = turn, engine.start(branches[5], how[5][turn])
        for i, (turn, request) in list(live.items()):
            if not request.done:
                continue
            found[i, turn] = request.completion
            del live[i]
            if turn == 3:
                continue
            if turn == 1 and i % 4 == 0:  # goes on in a copy
                (child,) = branches[i].fork()
                branches[i].close()
                branches[i] = child
            branches[i].append(words[i][turn + 1])
            live[i] = turn + 1, engine.start(branches[i], how[i][turn + 1])
    for branch in branches:
        branch.close()
    assert engine.pool.n_free == engine.pool.n_pages
    return drawn([found[key] for key in sorted(found)])


def kind_of(rng: random.Random) -> SamplingParams:
    given: dict[str, Any] = {"max_new_tokens": rng.randint(1, 25), "seed": rng.randrange(1000)}
    given |= rng.choice([{}, {}, {"top_k": 7}, {"top_p": 0.3}, {"temperature": 0.0}])
    given |= rng.choice(
        [
            {},
            {},
            {},
            {"allow": lambda ids: [3, 4, 5 + len(ids)]},
            {"stop_strings": ("7",)},
            {"candidates": (1, 2)},
        ]
    )
    return SamplingParams(**given, stop_token_ids=tuple(rng.sample(range(V), 12)))


@pytest.mark.parametrize("seed", range(3))
def test_turns_on_a_device_that_is_behind(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    text = {"decode": lambda ids: " ".join(map(str, ids)), "max_step_tokens": 48, "max_batch": 9}
    plain = turns(Engine(model, decode_steps=1, **text), seed, 0)
    queue = Queue(monkeypatch, 2)
    for tokens in (8192, 768):
        engine = queued(Engine(model, decode_steps=6, cache_tokens=tokens, **text))
        assert turns(engine, seed, 4 + seed) == plain
    assert queue.overlaps > 5
    with torch.no_grad():
        model.head_weight.mul_(1.01)
    fresh = turns(Engine(model, decode_steps=1, **text), seed, 0)
    assert turns(engine, seed, 9) == fresh != plain
    engine.start(engine.open([1, 2]), SamplingParams(max_new_tokens=30))
    for _ in range(3):
        engine.step()
    engine.abort()
    engine.release_memory()
    assert turns(engine, seed, 2) == fresh


def test_who_loses_its_pages_goes_on_from_what_the_host_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempted while steps are on their way, and admitted again at once, on a twin's page and a new one."""
    model = make_model()
    params = SamplingParams(max_new_tokens=30, seed=5)
    plain = drawn(Engine(model, decode_steps=1).generate([list(range(10))] * 2, params))
    queue = Queue(monkeypatch, 2)
    engine = queued(Engine(model, decode_steps=8))
    twins = [engine.start(engine.open(range(10)), params) for _ in range(2)]
    engine.step()
    engine.step()
    victim = twins[1]
    assert (victim.branch.n_cached, victim.ahead) == (16, 2)
    lost = victim.branch.pages[1]
    engine._scheduler._preempt(victim)
    taken = engine.pool.take(1)
    assert taken == [lost]
    queue.run_to(queue.n_put)
    engine._runner.kv[:, :, lost] = 9.0
    engine.step()
    assert victim.branch.pages[0] == twins[0].branch.pages[0]
    engine.run()
    assert drawn([twin.completion for twin in twins]) == plain


def test_a_prefill_and_the_steps_beside_it_are_launched_before_either_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    Queue(monkeypatch, 2)
    for name in ("execute", "decode"):
        launch = getattr(runner.Runner, name)

        def launched(*arguments: Any, name: str = name, launch: Any = launch) -> Any:
            order.append(f"launch {name}")
            read = launch(*arguments)
            return lambda: order.append(f"read {name}") or read()

        monkeypatch.setattr(runner.Runner, name, launched)
    engine = queued(Engine(make_model(), decode_steps=4))
    params = SamplingParams(max_new_tokens=20, seed=1)
    engine.start(engine.open([1, 2]), params)
    engine.step()
    engine.start(engine.open(list(range(40))), params)
    order.clear()
    engine.step()
    assert order == ["launch execute", "launch decode", "read execute", "read decode"]
