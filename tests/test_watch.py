"""A run that is made to collapse notices: it warns, stops with the reason, or goes back, killed or not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.grpo.collapse import Watch, WatchSection
from duologue.grpo.commands.report import write_report
from duologue.grpo.config import load_config
from duologue.grpo.console import Progress
from duologue.grpo.run_dir import RunDir, read_lines
from duologue.grpo.talk_stats import talk_stats
from duologue.grpo.trainer import train
from duologue.rollout.selfplay.dialogue import Turn
from judge_server import ASPECTS, JudgeServer
from safetensors.torch import load_file
from test_collective import SMALL
from test_world import make_groups, together
from tiny import LETTERS, dying, lines

SILENCE = '''
class Silence:
    """Whoever says less gets more."""

    def reset(self, seed):
        self.said = []

    def observe(self):
        return len(self.said) % 2, "say something ."

    def step(self, text):
        self.said.append(len(text))
        return len(self.said) == 4

    def legal(self):
        return ["a b c d e f", "b c d e f g", "g"]

    def scores(self):
        return tuple(1 - sum(self.said[side::2]) / 40 for side in (0, 1))
'''
RUN = [
    *LETTERS,
    "rollout.cache_tokens=16384",
    "train.save_every=1",
    "train.keep_checkpoints=9",
    "grpo.group_size=3",
    "grpo.groups_per_step=2",
    "grpo.schedule=constant",
    "grpo.warmup_steps=0",
    "dialogue.max_tokens_per_turn=8",
    "eval.dialogues=2",
    "eval.partners=[]",
    "watch.fast_steps=2",
    "watch.slow_steps=4",
]
TOO_FAST = [  # and back: at most once
    "train.steps=9",
    "grpo.learning_rate=0.1",
    "watch.entropy=1.6",
    'watch.rollback=["entropy"]',
    "watch.rollback_rate=0.1",
    "watch.max_rollbacks=1",
    "opponent.kind=mix",
    "opponent.mix={self = 0.5, pool = 0.5}",
    "opponent.pool_every=1",
]


class Heard(Progress):
    """Keeps what a user is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def log(self, message: str) -> None:
        self.said.append(message)


def run_whole(path: Path, *more: str) -> tuple[dict[str, Any], list[str]]:
    config, heard = load_config("text-game", [*RUN, *more]), Heard()
    summary = train(config, RunDir.create(path, config.to_toml()), heard, threading.Event())
    return summary, heard.said


def watched(path: Path) -> list[dict[str, Any]]:
    return [row["watch"] for row in read_lines(path / "metrics.jsonl") if row["stage"] == "selfplay"]


# ---- runs that collapse ------------------------------------------------------------------------------------


def test_a_reward_for_silence_is_seen_in_the_length_of_turns(tmp_path: Path) -> None:
    (tmp_path / "silence.py").write_text(SILENCE)
    settings = [f"game.name={tmp_path / 'silence.py'}", "train.steps=20", "grpo.learning_rate=3e-2"]
    settings.append("dialogue.max_tokens_per_turn=16")
    rule = ["watch.length=1.5", 'watch.stop=["length"]']
    summary, said = run_whole(tmp_path / "run", *settings, *rule)
    rows = watched(tmp_path / "run")
    assert rows[-1]["turn_tokens"] < rows[0]["turn_tokens"] / 1.5
    assert summary["stopped"].startswith("watch.length: a turn has ")
    assert summary["steps"] == len(rows) < 20
    assert any(line.startswith("warning: after step ") and "a turn has" in line for line in said)
    assert "ended early" in write_report(tmp_path / "run").read_text()


def test_a_judge_that_is_always_0_stops_the_run(
    judge_server: JudgeServer,
    chat_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By default after 50 steps in which no group had variance; here after two."""
    plain = judge_server.answer

    def nothing(prompt: str) -> dict[str, Any]:
        return {key: 0 if key in ASPECTS else said for key, said in plain(prompt).items()}

    monkeypatch.setattr(judge_server, "answer", nothing)
    settings = [*SMALL, f"judge.url={judge_server.url}", "train.steps=9", "watch.idle=2"]
    command = ["train", "collective-agency", "--model", str(chat_checkpoint), *settings]
    assert main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["stopped"] == "watch.idle: nothing is learned: no group had variance in 2 steps"
    assert f"self-play ended after step 2: {summary['stopped']}" in capsys.readouterr().out
    assert main([*command, "--run-dir", str(tmp_path / "run"), "--resume"]) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_rate_that_changes_nothing_stops_the_run(tmp_path: Path) -> None:
    """The masters move, the weights that speak are all rounded to what they were."""
    settings = ["model.dtype=bfloat16", "train.steps=9", "grpo.learning_rate=1e-12", "watch.idle=3"]
    summary, _ = run_whole(tmp_path / "run", *settings)
    assert summary["stopped"] == "watch.idle: nothing is learned: no parameter changed in 3 steps"
    assert [row["changed"] for row in watched(tmp_path / "run")] == [False] * 3


@pytest.fixture(scope="module")
def too_fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watch") / "whole"
    run_whole(path, *TOO_FAST)
    return path


def gone_back(path: Path) -> dict[str, Any]:
    (rollback,) = [row["rollback"] for row in watched(path) if "rollback" in row]
    assert isinstance(rollback, dict)
    return rollback


def test_a_rate_too_high_goes_back_with_a_lower_one(too_fast: Path) -> None:
    rollback = gone_back(too_fast)
    assert rollback["why"].startswith("watch.entropy: the entropy is ")
    rows = read_lines(too_fast / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert [row["lr"] for row in rows] == pytest.approx(
        [0.1 if row["step"] < rollback["step"] else 0.01 for row in rows]
    )
    before, after = (
        load_file(too_fast / "checkpoints" / name / "model.safetensors") for name in names(rollback)
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    moments = [
        torch.load(too_fast / "checkpoints" / name / "optimizer.pt", weights_only=True)
        for name in names(rollback)
    ]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])
    assert "went back" in write_report(too_fast).read_text()


def names(rollback: dict[str, Any]) -> tuple[str, str]:
    return rollback["to"].replace("good_", "step_"), f"step_{rollback['step']:06d}"


@pytest.mark.parametrize("later", [-1, 1])
def test_kill_9_around_a_rollback_and_resume_gives_the_same_run(
    too_fast: Path, tmp_path: Path, later: int
) -> None:
    """Killed as the line that says so is written, and in the step after."""
    path = tmp_path / "run"
    command = ["train", "text-game", *RUN, *TOO_FAST, "train.save_every=1", "--run-dir", str(path)]
    after = gone_back(too_fast)["step"] + later
    killed = subprocess.run([*dying(after), *command], capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main([*command, "--resume"]) == 0
    assert lines(path) == lines(too_fast)
    assert read_lines(path / "dialogues.jsonl") == read_lines(too_fast / "dialogues.jsonl")
    last = sorted(p.name for p in (too_fast / "checkpoints").glob("step_*"))[-1]
    here, there = (load_file(p / "checkpoints" / last / "model.safetensors") for p in (path, too_fast))
    assert all(torch.equal(here[key], there[key]) for key in there)


def test_a_kill_before_the_snapshots_are_those_gone_back_to(too_fast: Path, tmp_path: Path) -> None:
    """The checkpoint says that the policy went back; what opponents were taken since is written at resume."""
    path, rollback = Path(shutil.copytree(too_fast, tmp_path / "run")), gone_back(too_fast)
    for checkpoint in (path / "checkpoints").glob("[sg]*_0*"):
        if int(checkpoint.name[5:]) > rollback["step"]:
            shutil.rmtree(checkpoint)
    for snapshot in (path / "opponents").iterdir():
        weights = snapshot / "model.safetensors"
        if int(snapshot.name[5:]) > int(rollback["to"][5:]):
            shutil.copytree(path / "checkpoints" / "warm_start", snapshot, dirs_exist_ok=True)
            assert weights.is_file()
    (path / "summary.json").unlink()
    assert main(["train", "text-game", *RUN, *TOO_FAST, "--run-dir", str(path), "--resume"]) == 0
    assert lines(path) == lines(too_fast)


# ---- figures and rules -------------------------------------------------------------------------------------


def test_figures_are_those_of_all_ranks_and_of_plain_counting() -> None:
    groups = make_groups(3)
    rng = random.Random(0)
    for group in groups:
        for dialogue in group.dialogues:
            for number in range(4):
                ids = [rng.randrange(3) for _ in range(rng.randrange(6))]
                turn = Turn(
                    role=number % 2, kind="utterance", text="", token_ids=ids, logprobs=[0.0] * len(ids)
                )
                dialogue.turns.append(turn)
    whole = talk_stats(groups, {2})
    assert together(lambda world: talk_stats(world.share(groups), {2}, world)) == [whole, whole]
    said = [
        (turn.token_ids, dialogue.turns[at - 1].token_ids if at else [])
        for group in groups
        for dialogue in group.dialogues
        for at, turn in enumerate(dialogue.turns)
        if dialogue.players[turn.role] == "policy"
    ]
    assert whole["turn_tokens"] == pytest.approx(sum(len(ids) for ids, _ in said) / len(said))
    assert whole["cut"] == pytest.approx(sum(ids[-1:] != [2] for ids, _ in said) / len(said))
    shares = []
    for ids, before in said:
        heard, mine = ([" ".join(map(str, x[i : i + 3])) for i in range(len(x) - 2)] for x in (before, ids))
        if heard and mine:
            shares.append(sum(part in heard for part in mine) / len(mine))
    assert whole["echo"] == pytest.approx(sum(shares) / len(shares))
    for side in (0, 1):
        rewards = [
            [d.reward[side] for d in g.dialogues if d.reward and d.players[side] == "policy"] for g in groups
        ]
        flat = [r for group in rewards for r in group]
        assert whole[f"reward_{side}"] == pytest.approx(sum(flat) / len(flat))
        known = [group for group in rewards if group]
        assert whole[f"no_variance_{side}"] == sum(len({*group}) == 1 for group in known) / len(known)


FINE = {
    **{f"reward_{side}": 0.5 for side in (0, 1)},
    **{f"no_variance_{side}": 0.1 for side in (0, 1)},
    "win_share": 0.5,
    "distinct_2": 0.4,
    "echo": 0.2,
    "turn_tokens": 9.0,
    "cut": 0.0,
    "malformed": 0.1,
}


def line(entropy: float = 1.0, kl: float | None = 0.1, score: float = 0.5, **more: Any) -> dict[str, Any]:
    evaluation = {"itself": {}, "start": {"score": score}}
    row = {"stage": "selfplay", "entropy": entropy, "kl_start": kl, "no_variance_share": 0.1}
    return {**row, "eval": evaluation, "watch": {**FINE, "changed": True, **more}}


def test_a_reward_that_is_noise_around_zero_does_not_fall() -> None:
    """As in a game of constant sum, where the mean is near nothing."""
    for seed in range(20):
        watch, rng = Watch(WatchSection(stop=(), rollback=("reward",))), random.Random(seed)
        for _ in range(100):
            watch.feed(line(**{f"reward_{side}": rng.gauss(0.0, 0.1) for side in (0, 1)}))
            assert not watch.alarms


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("reward", {"reward_1": 0.1}),
        ("one_sided", {"win_share": 0.01}),
        ("one_sided", {"win_share": 0.99}),
        ("no_variance", {"no_variance_0": 1.0}),
        ("distinct", {"distinct_2": 0.05}),
        ("echo", {"echo": 0.95}),
        ("length", {"turn_tokens": 1.0}),
        ("length", {"turn_tokens": 90.0}),
        ("malformed", {"malformed": 0.9}),
        ("malformed", {"cut": 0.9}),
        ("entropy", {"entropy": 0.01}),
        ("entropy", {"entropy": 20.0}),
        ("kl", {"kl": 12.0}),
        ("start_score", {"score": 0.1}),
        ("idle", {"changed": False}),
    ],
)
def test_each_rule_sees_what_it_is_for_and_nothing_else(rule: str, bad: dict[str, Any]) -> None:
    config = WatchSection(slow_steps=30, idle=5, stop=(), rollback=(rule,), max_rollbacks=1)
    watch = Watch(config)
    for _ in range(40):
        watch.feed(line())
        assert not watch.alarms
    for _ in range(30):
        watch.feed(line(**bad))
        assert {*watch.alarms} <= {rule}
        if watch.alarms:
            break
    assert watch.new == [rule]
    assert watch.action[0] == "rollback"
    watch.went_back({"step": 71, "to": "warm_start"})
    assert watch.action == ("", "")
    assert watch.rate_scale == 0.5
    for _ in range(40):
        watch.feed(line(**bad))
    assert watch.action[0] == "stop" or rule == "reward"  # whose slow mean has followed
    off = Watch(WatchSection(slow_steps=30, **{rule: type(getattr(config, rule))(0), "stop": ()}))
    for row in [line()] * 40 + [line(**bad)] * 30:
        off.feed(row)
    assert not off.alarms


def test_what_is_known_comes_from_the_lines_alone(too_fast: Path) -> None:
    """As JSON, with nulls in place of what was not measured, and cut in two anywhere."""
    rows = [line(entropy=random.Random(i).random() + 0.5, kl=None if i % 3 else 0.2) for i in range(50)]
    live, again = Watch(WatchSection()), Watch(WatchSection())
    for row in rows:
        live.feed(row)
        again.feed(json.loads(json.dumps(row)))
    assert (live.fast, live.slow, live.first) == (again.fast, again.slow, again.first)
    seen = Watch(load_config("text-game", [*RUN, *TOO_FAST]).watch)
    for row in read_lines(too_fast / "metrics.jsonl"):
        seen.feed(row)
        assert seen.alarms == ({} if "rollback" in row["watch"] else row["watch"].get("alarms", {}))
    assert len(seen.rollbacks) == 1


def test_rules_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"watch\.stop = 'rewards': accepted is one of 'reward', 'one_sided'"
    ):
        load_config("deal", ['watch.stop=["rewards"]'])
    with pytest.raises(
        ValueError, match=r"watch\.rollback = .*: accepted is rules that are not in watch\.stop"
    ):
        load_config("deal", ['watch.rollback=["idle"]'])
