"""train.tokens_per_microbatch = 0: by the plan and a GPU's total memory, of which there is a stub here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo import cli, policy
from duologue.grpo.cli import main
from duologue.grpo.config import Config, load_config
from duologue.grpo.microbatch import MOST, SHARE, STEP, fitted, with_tokens
from duologue.grpo.plan import GB, check_memory, make_plan, shape_of
from duologue.grpo.sections import TrainSection
from duologue.grpo.world import World

SIZES = [  # of a model that fills some GB
    "model.hidden_size=2048",
    "model.intermediate_size=6144",
    "model.num_layers=28",
    "model.num_heads=16",
    "model.num_kv_heads=8",
    "model.head_dim=128",
    "model.dtype=bfloat16",
    "opponent.kind=self",
]


def config_of(*more: str) -> Config:
    return load_config("deal", ["model.device=cuda", "train.tokens_per_microbatch=0", *SIZES, *more])


class Memory:
    """Of each device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total = self.free = 80 * GB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, self.total))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


def tokens(config: Config, **how: Any) -> int:
    return fitted(config, **how).train.tokens_per_microbatch


@pytest.mark.parametrize(
    ("more", "sizes"),
    [
        ((), (60, 70, 80, 10_000)),
        (("rollout.cache_tokens=0",), (44, 50, 56, 10_000)),  # a pool that is not there in an update
    ],
)
def test_the_most_tokens_that_fit(more: tuple[str, ...], sizes: tuple[int, ...], memory: Memory) -> None:
    config = config_of(*more)
    shape = shape_of(config)
    assert shape is not None
    found = []
    for gigabytes in sizes:
        memory.total = gigabytes * GB
        found.append(tokens(config))
        for n, fits in ((found[-1], True), (found[-1] + STEP, False)):
            plan = make_plan(with_tokens(config, n), shape, memory=memory.total)
            if n <= MOST:
                needed = plan.update if more else plan.peak
                assert (needed <= SHARE * memory.total) == fits
    assert found == sorted(found)
    assert len({*found}) > 2
    assert found[-1] == MOST


def test_what_is_free_changes_nothing(memory: Memory) -> None:
    expected = tokens(config_of())
    memory.free = GB
    assert tokens(config_of()) == expected
    memory.total = 40 * GB
    assert tokens(config_of()) < expected


def test_what_is_said_stays_and_a_cpu_has_its_default(memory: Memory) -> None:
    assert tokens(config_of("train.tokens_per_microbatch=700")) == 700
    assert tokens(load_config("deal")) == load_config("deal").train.tokens_per_microbatch > 0
    assert load_config("collective-agency").train.tokens_per_microbatch == 16_384
    assert load_config("collective-agency", ["model.device=cuda"]).train.tokens_per_microbatch == 0
    with pytest.raises(ValueError, match=r"train.tokens_per_microbatch = 0: accepted is 1 or more on cpu"):
        load_config("deal", ["train.tokens_per_microbatch=0"])
    unknown = load_config("deal", ["model.device=cuda", "train.tokens_per_microbatch=0", "model.path=/none"])
    assert tokens(unknown) == TrainSection().tokens_per_microbatch


def test_what_cannot_fit_is_said_before_anything_is_loaded(memory: Memory) -> None:
    memory.total = memory.free = 20 * GB
    config = fitted(config_of())
    assert config.train.tokens_per_microbatch == STEP
    with pytest.raises(MemoryError, match=r"needs .* GB on cuda at least"):
        check_memory(config)


def test_ranks_go_by_the_smallest_memory(memory: Memory) -> None:
    class OneOfTwo(World):
        size = 2

        def each(self, value: Any) -> list[Any]:
            return [value, 60 * GB]

    both = tokens(config_of(), ranks=2, world=OneOfTwo())
    memory.total = 60 * GB
    assert both == tokens(config_of(), ranks=2)
    assert both > tokens(config_of())  # a rank has a part of the state


def test_a_run_writes_it_down_and_goes_on_with_it(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the device has another memory by then."""
    seen: list[Config] = []

    def train(options: Any, config: Config, run: Any, *_: Any) -> int:
        seen.append(config)
        run.close()
        return 0

    monkeypatch.setattr(policy, "check_device", lambda config: None)
    monkeypatch.setattr(cli, "_train_run", train)
    words = ["train", "collective-agency", "--run-dir", str(tmp_path / "run"), "--device", "cuda"]
    words += [
        word for setting in SIZES for word in (f"--{setting.partition('=')[0]}", setting.partition("=")[2])
    ]
    words += ["--judge.url", "http://127.0.0.1:9/v1"]
    assert main(words) == 0
    memory.total = 60 * GB
    assert main([*words, "--resume"]) == 0
    first, again = (config.train.tokens_per_microbatch for config in seen)
    assert 0 < first == again != tokens(config_of())
    written = (tmp_path / "run" / "config.toml").read_text("utf-8")
    assert f"tokens_per_microbatch = {first}\n" in written


def test_the_plan_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "collective-agency", "--model", "Qwen3-4B", "--json", "model.dtype=bfloat16"]
    assert main([*words, "lora.rank=16"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["tokens_per_microbatch"] % STEP == 0
    assert main([*words, "lora.rank=16", "--gpu-memory", "60"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_microbatch"] < told["tokens_per_microbatch"]
