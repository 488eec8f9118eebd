"""The path of a GPU, as far as it can be walked without one: what is imported there, which device is used,
how a loop owns its graphs, what an update sums in which order.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from duologue.grpo.build import build_engine
from duologue.grpo.checkpoints import read_state, write_state
from duologue.grpo.cli import main
from duologue.grpo.config import load_config
from duologue.grpo.opponents import Opponents
from duologue.grpo.policy import load_beside
from duologue.grpo.unsaid import kept_of
from duologue.kernels import backend, libraries
from duologue.kernels.gpu import launcher
from duologue.kernels.gpu.attention_decode import work_of
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.model.peft import write_adapter
from duologue.rollout.engine import decode_gpu, kv_memory
from duologue.rollout.engine.buckets import Bucket
from duologue.rollout.engine.decode_gpu import DeviceLoop
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.runner import Runner
from duologue.rollout.engine.sequence import Completion, SamplingParams
from tiny import TINY_DEAL, decoder
from torch.cuda._utils import _get_device_index

ROOT = Path(__file__).parent.parent
ABSENT = ("trl", "liger_kernel", "flash_attn", "bitsandbytes", "tenacity", "textarena", "openai")  # may be
HIDE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def without(cls, name, *rest):
    return None if name.partition(".")[0] in {ABSENT} else find(name, *rest)
PathFinder.find_spec = classmethod(without)
"""


def test_tests_are_collected_where_other_trainers_are_not_installed() -> None:
    """Of the GPU tests, and those that once imported trl at their head, with the trainer itself."""
    code = f"""{HIDE}
import sys, pytest
import duologue.grpo.cli, duologue.grpo.trainer
files = ["tests/test_gpu.py", "tests/test_chat.py"]
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tests/test_gpu.py::" in done.stdout
    assert "tests/test_chat.py::" in done.stdout


def test_no_test_imports_what_may_be_absent_at_its_head() -> None:
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {*ABSENT}, path.name


def test_sums_and_heads_in_the_interpreter() -> None:
    interpreter.passes("interpreted_path.py")


# ---- the device --------------------------------------------------------------------------------------------


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current, launches = [0], []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **constants: launches.append((current[0], grid, arguments, constants))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    for index in (0, 3):
        x: Any = SimpleNamespace(is_cuda=True, get_device=lambda index=index: index)
        launcher.launch(Kernel(), (2, 5), x, 7, BLOCK=16)
        assert launches.pop() == (index, (2, 5), (x, 7), {"BLOCK": 16})
        assert current == [0]


def test_no_kernel_is_launched_elsewhere() -> None:
    """A call of a subscript is a launch: kernel[grid](...)."""
    files = sorted((ROOT / "kernels/gpu").glob("*.py"))
    assert len(files) > 5
    launching = [
        path.stem
        for path in files
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert launching == ["launcher", "launcher"]


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
@pytest.mark.parametrize("command", ["train", "eval", "play"])
def test_a_command_makes_its_gpu_the_current_one(
    command: str, device: str, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Chosen(BaseException):
        pass

    def set_device(device: Any) -> None:
        raise Chosen(_get_device_index(device))  # as torch's own does, which takes no "cuda" without a number

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    checkpoint, settings = str(tmp_path / "model"), [*TINY_DEAL, f"model.device={device}"]
    words = {
        "train": ["train", "deal", "--run-dir", str(tmp_path / "run")],
        "eval": ["eval", checkpoint, "--recipe", "deal"],
        "play": ["play", checkpoint, "--game", "deal"],
    }[command]
    with pytest.raises(Chosen, match=f"^{index}$"):
        main(
            [
                *words,
                *(
                    word
                    for setting in settings
                    for word in (f"--{setting.replace('=', ' ', 1)}".split(" ", 1))
                ),
            ]
        )


@pytest.mark.parametrize(("served", "on_cpu"), [("avx2", "float32"), ("amx", "bfloat16")])
def test_a_run_on_a_gpu_has_settings_that_suit_one(
    served: str, on_cpu: str, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is said; what is said stays, and a run's own file is taken as it is."""
    monkeypatch.setattr(backend, "instruction_set", lambda device, dtype: served)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3")[0], folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), "utf-8")
    cpu, gpu = (
        load_config("collective-agency", [f"model.device={device}", f"model.path={folder}"])
        for device in ("cpu", "cuda")
    )
    assert (cpu.model.dtype, gpu.model.dtype) == (on_cpu, "bfloat16")
    assert (cpu.rollout.page_size, cpu.rollout.max_step_tokens) == (16, 1024)
    assert (gpu.rollout.page_size, gpu.rollout.max_step_tokens) == (64, 8192)
    assert gpu.rollout.cache_tokens > cpu.rollout.cache_tokens
    assert (cpu.train.recompute, gpu.train.recompute) == ("none", "norms")
    assert not gpu.rollout.released
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}), "utf-8")
    half = load_config("collective-agency", ["model.device=cuda", f"model.path={folder}"])
    assert half.model.dtype == "bfloat16"
    said = ["model.device=cuda:1", f"model.path={folder}", "model.dtype=float16", "rollout.page_size=32"]
    chosen = load_config("collective-agency", said)
    assert (chosen.model.dtype, chosen.rollout.page_size) == ("float16", 32)
    assert load_config("deal", ["model.device=cuda"]).model.dtype == "float32"
    lines = (
        load_config("deal").to_toml().replace('device = "cpu"', 'device = "cuda"').splitlines(keepends=True)
    )
    older = "".join(line for line in lines if not line.startswith("gradient_accumulation_fusion"))
    (tmp_path / "config.toml").write_text(older, "utf-8")
    assert load_config(str(tmp_path / "config.toml")).rollout.page_size == 16
    assert gpu.train.gradient_accumulation_fusion
    again = load_config("deal", ["model.device=cuda"], kept_of(tmp_path))  # a run older than the setting
    assert not again.train.gradient_accumulation_fusion


def test_max_step_tokens_reaches_the_engine() -> None:
    engine = build_engine(load_config("deal", ["rollout.max_step_tokens=77", *TINY_DEAL]), decoder())
    assert engine._scheduler.max_step_tokens == 77


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_on_a_gpu_the_pool_is_taken_by_the_first_request(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that imitation, and a resumed optimizer's state, have the memory. On CPU it is taken at once."""
    taken: list[Any] = []
    weight = SimpleNamespace(device=SimpleNamespace(type=kind), dtype=torch.float32, element_size=lambda: 4)
    model: Any = SimpleNamespace(
        config=decoder().config,
        model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight)),
        paged_layers=lambda: None,
        head_weight=weight,
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(kv_memory, "load_driver", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: taken.append(shape) or torch.zeros(1))
    runner = Runner(model, [None], 4, 16, 1)
    assert len(taken) == (kind == "cpu")
    assert runner.kv is runner.kv
    assert len(taken) == 1


def test_the_state_of_a_resume_is_read_to_the_host(tmp_path: Path) -> None:
    state: Any = {"step": 3}
    with pytest.MonkeyPatch.context() as patch:
        places: list[Any] = []
        load = torch.load
        patch.setattr(torch, "load", lambda *a, **k: places.append(k["map_location"]) or load(*a, **k))
        write_state(tmp_path, state, {"exp_avg.x": torch.ones(3)})
        assert read_state(tmp_path)[0] == state
        assert places == ["cpu"]


def test_snapshots_take_slots_that_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = decoder(vocab_size=70)
    settings = LoraSettings(rank=2, base=str(tmp_path / "base"))
    policy = LoraDecoder(base, new_adapter(base, settings, 0))
    for step in (1, 2, 3, 4):
        adapter = new_adapter(base, settings, step)
        for _, b in adapter.pairs.values():
            b.data.normal_() if step != 3 else b.data.zero_()
        (tmp_path / str(step)).mkdir()
        write_adapter(adapter, tmp_path / str(step))
    engine, forgotten = Engine(policy), []
    monkeypatch.setattr(engine._runner, "forget_graphs", lambda: forgotten.append(1))
    opponents: Any = SimpleNamespace(model=policy, engine=engine, _slots=[], _present={})
    opponents._path = lambda step: tmp_path / str(step)

    def addresses() -> list[int]:
        return [p.data_ptr() for slot in opponents._slots for p in slot.parameters()]

    def use(*steps: int) -> None:
        Opponents._use_adapters(opponents, [*steps])
        assert {*opponents._present} == {*steps}
        for step, at in opponents._present.items():
            expected = load_beside(policy, tmp_path / str(step))
            held = engine.adapters[at]
            if isinstance(expected, LoraDecoder):
                assert held is not None
                assert all(map(torch.equal, held.parameters(), expected.adapter.parameters()))
            else:
                assert held is None

    use(1, 2)
    before, place = addresses(), opponents._present[2]
    use(2, 4)
    assert opponents._present[2] == place
    use(3, 4)
    use(1)
    assert addresses() == before
    assert len(forgotten) == 1
    use(1, 2, 4)
    assert addresses()[: len(before)] == before
    assert len(forgotten) == 2


# ---- libraries ---------------------------------------------------------------------------------------------


def old_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    **rest: Any,
) -> Any:
    """The arguments up to torch 2.9: no scale."""


@pytest.mark.parametrize("told", [False, True])
def test_enable_gqa_is_passed_where_the_signature_has_it(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11's has none, and takes fewer key heads without."""
    from torch.nn.attention import varlen

    given: dict[str, Any] = {}

    def before(q: Any, k: Any, v: Any, *lengths: Any, scale: Any = None, window_size: Any = (-1, -1)) -> Any:
        given.update(scale=scale, window_size=window_size)
        return q

    def now(
        q: Any, k: Any, v: Any, *lengths: Any, scale: Any = None, window_size: Any = 0, enable_gqa: Any = 0
    ) -> Any:
        given.update(scale=scale, window_size=window_size, enable_gqa=enable_gqa)
        return q

    monkeypatch.setattr(libraries, "HAS_FLASH_ATTN", False)
    monkeypatch.setattr(varlen, "varlen_attn", now if told else before)
    libraries.varlen_options.cache_clear()
    try:
        q: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(5, 4, 64))
        serving = libraries.attention(q, exact=False)
        assert serving is not None
        assert serving(q, q, q, torch.tensor([0, 5]), 0.1, 5) is q
        assert given == {"scale": 0.1, "window_size": (-1, 0), **({"enable_gqa": True} if told else {})}
        assert "varlen_attn" in libraries.describe_attention()
        assert ("without enable_gqa" in libraries.describe_attention()) is not told
        libraries.varlen_options.cache_clear()
        monkeypatch.setattr(varlen, "varlen_attn", old_varlen)
        assert libraries.attention(q, exact=False) is None
        assert libraries.describe_attention().startswith("Triton")
    finally:
        libraries.varlen_options.cache_clear()


# ---- graphs ------------------------------------------------------------------------------------------------


class Graphs:
    """Stands in for CUDA's streams and graphs: a replay runs the step that was captured. As CUDA does, it
    refuses to capture into a pool whose graphs are all gone.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[Any] = [None]  # the current one is the last
        self.captures: list[tuple[Any, Any, Any]] = []  # stream of the warm-up, of the capture, pool
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.warm: Any = None
        self.step: Any = None
        graphs, step_of = self, DeviceLoop._step_of

        def recorded(loop: DeviceLoop, *arguments: Any) -> Any:
            step = step_of(loop, *arguments)

            def run() -> None:
                graphs.warm, graphs.step = graphs.streams[-1], step
                step()

            return run

        class Graph:
            def __init__(self) -> None:
                graphs.alive.add(self)

            def pool(self) -> Any:
                return self.memory

            def replay(self) -> None:
                self.step()

        monkeypatch.setattr(DeviceLoop, "_step_of", recorded)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Iterator[None]:
        gc.collect()
        assert pool is None or any(pool is getattr(g, "memory", None) for g in self.alive), "a dead pool"
        self.captures.append((self.warm, stream, pool))
        graph.memory = pool or object()
        yield
        graph.step = self.step


class Stream:
    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, Stream)


def drawn(completions: list[Completion]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.logprobs, c.finish_reason) for c in completions]


def test_a_loop_owns_its_stream_and_the_pool_of_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loops; one forgets its graphs, the other replays its own, and the first captures again."""
    monkeypatch.setattr(Decoder, "paged_layers", lambda self: None)
    graphs, model = Graphs(monkeypatch), decoder(vocab_size=70)
    prompts = [[1, 2, 3], [4], [5, 6]]
    params = [SamplingParams(max_new_tokens=12 - i, seed=i) for i in range(3)]
    plain = drawn(Engine(model, decode_steps=1).generate(prompts, params))
    engines = [Engine(model, decode_steps=4) for _ in range(2)]
    loops: list[Any] = [engine._runner.loop for engine in engines]
    for loop in loops:
        loop.capture = True
    assert all(drawn(engine.generate(prompts, params)) == plain for engine in engines)
    assert all(warm is captured is not None for warm, captured, _ in graphs.captures)
    assert len({id(captured) for _, captured, _ in graphs.captures}) == 2
    before = len(graphs.captures)
    loops[0].forget()
    assert drawn(engines[1].generate(prompts, params)) == plain
    assert len(graphs.captures) == before
    assert drawn(engines[0].generate(prompts, params)) == plain
    again = graphs.captures[before:]
    assert again[0][2] is None
    assert all(pool is not None for *_, pool in again[1:])
    assert {id(captured) for _, captured, _ in again} == {id(graphs.captures[0][1])}


def test_rows_that_share_pages_are_alone_while_their_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The buffers are empty then, and an index out of range would end a process that has a GPU."""
    Graphs(monkeypatch)
    engine = Engine(decoder(vocab_size=70), decode_steps=4)
    requests = [engine.start(engine.open([1, 2, 3]), SamplingParams(max_new_tokens=9)) for _ in range(3)]
    groups = np.array([0, 3, 4, 4, 4], np.int32), np.array([512, 0, 0, 0], np.int32)
    monkeypatch.setattr(decode_gpu, "shared_groups", lambda *_: groups)
    with monkeypatch.context() as triton:
        triton.setattr(backend, "triton", lambda _: True)
        loop: Any = DeviceLoop(engine.model, engine.adapters, 7, 4, True)
        loop.kv, loop.page_size = torch.zeros(1), 16
        arrays = loop._arrays(requests, 4, 32)
    bucket = Bucket(arrays, 4, False, torch.device("cpu"))
    seen: list[Any] = []

    def step() -> None:
        lengths = (torch.where(bucket.rows.state[1] > bucket.rows.last, 0, bucket.rows.state[1]) + 1).int()
        items, n = work_of(lengths, 512, 1, bucket.groups, narrow=True)
        seen.append(items[: int(n)].tolist())

    loop._captured(bucket, step)
    assert seen == [[[s, 1, 0] for s in range(4)]] * 3  # two warm-ups and the capture


def test_a_prefill_leaves_the_graph_of_those_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come while others decode: these go on by so many steps in the same step, with the same
    draws.
    """
    monkeypatch.setattr(Decoder, "paged_layers", lambda self: None)
    Graphs(monkeypatch)
    model = decoder(vocab_size=70)
    prompts = [[1, 2, 3], [4, 4], [5, 6], [7] * 20, [8, 9]]
    params = [SamplingParams(max_new_tokens=14 - i, seed=i) for i in range(5)]
    plain = drawn(Engine(model, decode_steps=1).generate(prompts, params))
    engine = Engine(model, decode_steps=4)
    loop: Any = engine._runner.loop
    loop.capture = True
    branches = [engine.open(prompt) for prompt in prompts]
    requests = [engine.start(branch, how) for branch, how in zip(branches[:3], params, strict=False)]
    engine.step()
    assert [len(r.completion.token_ids) for r in requests] == [1, 1, 1]
    engine.step()
    requests += [engine.start(branch, how) for branch, how in zip(branches[3:], params[3:], strict=True)]
    before = engine.stats.decode_tokens
    engine.step()
    assert [len(r.completion.token_ids) for r in requests] == [9, 9, 9, 1, 1]
    assert engine.stats.decode_tokens == before + 12
    engine.run()
    assert drawn([r.completion for r in requests]) == plain


@pytest.mark.parametrize(("adapters", "largest"), [(3, 512), (1, 4), (3, 2)])
def test_graphs_of_several_adapters_and_of_part_of_the_rows_draw_the_same(
    adapters: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opponents that are adapters decode in graphs beside the policy, and beyond the largest graph rows go on
    without one. Rows end at different times, and others begin.
    """
    monkeypatch.setattr(Decoder, "paged_layers", lambda self: None)
    monkeypatch.setattr(decode_gpu, "BUCKETS", tuple(b for b in decode_gpu.BUCKETS if b <= largest))
    graphs, base = Graphs(monkeypatch), decoder(vocab_size=70)
    policy, *others = (new_adapter(base, LoraSettings(rank=2, base=""), seed) for seed in range(3))
    for adapter in (policy, *others):
        for _, b in adapter.pairs.values():
            b.data.normal_()

    def drawn_with(steps: int) -> tuple[list[tuple[Any, ...]], Engine]:
        engine = Engine(LoraDecoder(base, policy), decode_steps=steps)
        engine.use_adapters(others)
        loop: Any = engine._runner.loop
        if loop is not None:
            loop.capture, loop.held = True, 2
        branches = [engine.open([i + 1, 5, 9], adapter=i % adapters) for i in range(7)]
        params = [SamplingParams(max_new_tokens=23 - 3 * i, seed=i) for i in range(7)]
        requests = [engine.start(branch, how) for branch, how in zip(branches[:5], params, strict=False)]
        for _ in range(2):
            engine.step()
        requests += [engine.start(branch, how) for branch, how in zip(branches[5:], params[5:], strict=True)]
        engine.run()
        return drawn([r.completion for r in requests]), engine

    plain, _ = drawn_with(1)
    found, engine = drawn_with(4)
    assert found == plain
    assert {key[2] for key in engine._runner.loop._buckets} == {*range(adapters)}  # type: ignore[union-attr]
    assert len(graphs.captures) >= adapters
