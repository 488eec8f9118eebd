"""Evaluations during a run: the best policy is kept, a kill changes nothing, two ranks measure the same."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.best import BEST, Best, measured
from duologue.grpo.build import build_engine, build_game
from duologue.grpo.cli import main
from duologue.grpo.commands.report import write_report
from duologue.grpo.config import load_config
from duologue.grpo.console import Progress
from duologue.grpo.crossplay import Player
from duologue.grpo.run_dir import RunDir, read_lines
from duologue.grpo.trainer import train
from duologue.grpo.world import ALONE, World
from duologue.model.checkpoint import load_model
from safetensors.torch import load_file
from test_world import together
from tiny import LETTERS, dying, lines

RUN = [  # of a game that a policy from nothing earns something in
    *LETTERS,
    "rollout.cache_tokens=16384",
    "train.steps=5",
    "train.save_every=1",
    "grpo.group_size=4",
    "grpo.groups_per_step=3",
    "grpo.learning_rate=3e-3",
    "dialogue.max_tokens_per_turn=10",
    "eval.dialogues=4",
    "eval.partners=[]",
]
EVERY = ["eval.every=1", "eval.every_dialogues=4", "train.keep_checkpoints=9"]


def timeless(path: Path) -> list[dict[str, Any]]:
    costs = ("eval_seconds", "eval_share")
    return [{key: value for key, value in row.items() if not key.endswith(costs)} for row in lines(path)]


def run_whole(path: Path, *more: str) -> dict[str, Any]:
    config = load_config("text-game", [*RUN, *more])
    return train(config, RunDir.create(path, config.to_toml()), Progress(quiet=True), threading.Event())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("best") / "whole"
    run_whole(path, *EVERY)
    return path


def test_evaluations_change_nothing_of_the_training(whole: Path, tmp_path: Path) -> None:
    run_whole(tmp_path / "plain")
    last = "checkpoints/step_000005/model.safetensors"
    here, there = load_file(whole / last), load_file(tmp_path / "plain" / last)
    assert all(torch.equal(here[name], there[name]) for name in here)
    kept = [{k: v for k, v in row.items() if "eval" not in k} for row in timeless(whole)]
    assert kept == timeless(tmp_path / "plain")
    assert not (tmp_path / "plain" / "checkpoints" / BEST).exists()


def test_the_best_checkpoint_is_that_of_the_best_evaluation(whole: Path) -> None:
    rows = read_lines(whole / "metrics.jsonl")
    seen = {0: rows[0]["start_eval"], **{row["step"] + 1: row["eval"] for row in rows}}
    rewards = {step: measures["itself"]["reward"] for step, measures in seen.items()}
    best = max(rewards, key=lambda step: (rewards[step], -step))
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["best"] == {"step": best, "by": "reward", "value": rewards[best]}
    kept = load_file(whole / "checkpoints" / BEST / "model.safetensors")
    same = load_file(whole / "checkpoints" / f"step_{best:06d}" / "model.safetensors")
    assert all(torch.equal(kept[name], same[name]) for name in same)
    assert all(0 < row["eval_share"] < 1 for row in rows)
    assert all(row["eval"]["start"]["dialogues"] == 8 for row in rows)


def test_an_evaluation_is_that_of_the_checkpoint_on_its_own(whole: Path) -> None:
    """Measured again from the files, with another engine, alone and by two ranks."""
    config = load_config("text-game", [*RUN, *EVERY])
    row = read_lines(whole / "metrics.jsonl")[-1]

    def again(world: World) -> Any:
        players = []
        for name in ("step_000005", "warm_start"):
            model, tokenizer = load_model(whole / "checkpoints" / name)
            engine = build_engine(config, model.requires_grad_(False))
            players.append(Player(name="start", engine=engine, tokenizer=tokenizer))
        return measured(players[0], players[1], build_game(config), config, None, world)

    assert again(ALONE) == row["eval"]
    assert together(again) == [row["eval"], row["eval"]]


def assert_same(a: Path, b: Path) -> None:
    assert timeless(a) == timeless(b)
    first, second = (json.loads((path / "summary.json").read_text())["best"] for path in (a, b))
    assert first == second
    here, there = (load_file(path / "checkpoints" / BEST / "model.safetensors") for path in (a, b))
    assert all(torch.equal(here[name], there[name]) for name in there)


def test_kill_9_and_resume_gives_the_same_best(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = ["train", "text-game", *RUN, *EVERY, "train.save_every=50", "--run-dir", str(path)]
    killed = subprocess.run([*dying(3), *command], capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main([*command, "--resume"]) == 0
    assert_same(path, whole)


def test_a_kill_between_a_checkpoint_and_the_best_loses_nothing(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    best = json.loads((path / "summary.json").read_text())["best"]["step"]
    for checkpoint in [*(path / "checkpoints").glob("step_*"), path / "checkpoints" / BEST]:
        if checkpoint.name == BEST or int(checkpoint.name[5:]) > best:
            shutil.rmtree(checkpoint)
    (path / "summary.json").unlink()
    assert main(["train", "text-game", *RUN, *EVERY, "--run-dir", str(path), "--resume"]) == 0
    assert_same(path, whole)


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    """Each dialogue has the same reward: the first evaluation is never beaten."""
    constant = ["eval.every=1", "train.best_by=unheard"]
    with pytest.raises(ValueError, match=r"train\.best_by = \"unheard\": accepted is one of reward, "):
        load_config("deal", constant)
    summary = run_whole(tmp_path / "run", *EVERY, "train.patience=2", "grpo.learning_rate=1e-12")
    assert summary["best"]["step"] == 0
    assert summary["stopped"] == "no better evaluation than that after step 0 in 2 in a row"
    assert summary["steps"] == 2
    assert "ended early" in (write_report(tmp_path / "run")).read_text()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--best"]) == 0
    kept = load_file(tmp_path / "run" / "checkpoints" / "warm_start" / "model.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in load_file(tmp_path / "out" / "model.safetensors").items())


def test_export_of_a_run_without_a_best_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--best"]) == 2
    assert "--best: there is no" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["reward", "-score", "start:policy"])
def test_what_counts_as_better(by: str) -> None:
    """Against max and min over the values so far, the earliest where several are as good."""
    rng, best, seen = random.Random(1), Best(by), []
    for step in range(40):
        value = float(rng.randrange(6)) if rng.random() < 0.8 else math.nan
        measures = {"itself": {"reward": value, "score": value}, "start": {"policy": value}}
        best.note(step, measures)
        seen.append(value)
        known = [v for v in seen if not math.isnan(v)]
        if known:
            assert best.value == (min(known) if by.startswith("-") else max(known))
            assert best.step == seen.index(best.value)
            assert best.waited == step - best.step
    again = Best(by)
    again.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert again.state_dict() == best.state_dict()
    with pytest.raises(ValueError, match="accepted is one of reward"):
        Best("unheard").note(0, {"itself": {"reward": 1.0}})
