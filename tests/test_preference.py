"""`duologue eval` on dilemmas: preference in both orders, intervals, a second judge; a real HTTP judge
whose verdicts are known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from duologue.grpo.cli import main
from duologue.grpo.commands.compare import bootstrap, mean, win_rate
from judge_server import JudgeServer, answer, inside, scores, serving
from test_collective import TASKS, checkpoint_dir, data

__all__ = ["checkpoint_dir", "data"]
QUESTIONS = [{"id": f"q{i}", "text": f"What is fair about rule {i}?"} for i in range(3)]
SMALL = [
    "dialogue.max_rounds=2",
    "dialogue.max_tokens_per_turn=10",
    "dialogue.max_tokens_final=12",
    "rollout.cache_tokens=32768",
]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return f"eval.questions={path}"


@pytest.fixture(scope="module")
def other_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sizes with other weights."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models") / "other"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_dir)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for path in checkpoint_dir.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def verdict(first: str, second: str) -> str:
    """By the sum of the scores that this judge would give."""
    a, b = sum(scores(first)), sum(scores(second))
    return "tie" if a == b else "1" if a > b else "2"


def choose(prompt: str) -> dict[str, Any]:
    shown = inside(prompt, 'answer id="1"') + inside(prompt, 'answer id="2"')
    return {"winner": verdict(*shown), "reason": "known"} if shown else answer(prompt)


def test_both_orders_both_sets_and_both_modes(
    checkpoint_dir: Path,
    other_dir: Path,
    data: list[str],
    questions: str,
    server: JudgeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = choose
    out = tmp_path / "result.json"
    command = [
        "eval",
        str(checkpoint_dir),
        "--recipe",
        "collective-agency",
        "--against",
        str(other_dir),
        "--json",
        str(out),
    ]
    assert main([*command, f"judge.url={server.url}", *data, questions, *SMALL]) == 0
    found = json.loads(out.read_text())
    asked = [body["messages"][0]["content"] for body in server.requests]
    pairs = [
        (inside(p, 'answer id="1"')[0], inside(p, 'answer id="2"')[0])
        for p in asked
        if '<answer id="1">' in p
    ]
    distinct = {(a, b) for a, b in pairs}
    assert sum(bool(a and b) for a, b in distinct) >= 4, "the answers are shown"
    assert all((b, a) in distinct for a, b in distinct), "every pair is asked in both orders"
    for mode in ("greedy", "sampled"):
        for name, n in (("conflicts", len(TASKS)), ("questions", len(QUESTIONS))):
            row = found[mode][name]
            assert row[str(checkpoint_dir)]["tasks"] == n
            assert ("agreement" in row[str(other_dir)]) == (name == "conflicts")
            p = row["preference"]
            assert p["inconsistent"] == p["unscored"] == 0  # this judge has no favourite place
            assert p["wins"] + p["losses"] + p["ties"] == n
    every = [
        found[mode][name]["preference"]
        for mode in ("greedy", "sampled")
        for name in ("conflicts", "questions")
    ]
    won = [verdict(*pair) for pair in distinct]
    assert (won.count("1") > 0) == any(p["wins"] + p["losses"] for p in every)
    for p in every:
        if p["wins"] + p["losses"]:
            assert p["win_rate"]["value"] == p["wins"] / (p["wins"] + p["losses"])
            assert p["win_rate"]["low"] <= p["win_rate"]["value"] <= p["win_rate"]["high"]
    assert found["judge"] == found["preference_judge"]
    text = capsys.readouterr().out
    assert "greedy conflicts" in text
    assert "sampled questions" in text


@pytest.mark.parametrize(
    ("rule", "field"), [(lambda a, b: "1", "inconsistent"), (lambda a, b: "tie", "ties")]
)
def test_a_judge_with_a_favourite_place_decides_nothing(
    checkpoint_dir: Path,
    other_dir: Path,
    data: list[str],
    questions: str,
    server: JudgeServer,
    tmp_path: Path,
    rule: Any,
    field: str,
) -> None:
    """The second judge is another server: the first never sees a pair."""
    with serving() as second:
        second.answer = lambda prompt: {"winner": rule("", ""), "reason": "always"}
        out = tmp_path / "result.json"
        command = [
            "eval",
            str(checkpoint_dir),
            "--recipe",
            "collective-agency",
            "--against",
            str(other_dir),
            "--json",
            str(out),
        ]
        settings = [
            f"judge.url={server.url}",
            f"eval.judge_url={second.url}",
            "eval.judge_model=other",
            "eval.dialogues=2",
        ]
        assert main([*command, *settings, *data, questions, *SMALL]) == 0
        assert second.requests
        assert all(body["model"] == "other" for body in second.requests)
    assert not any('<answer id="1">' in body["messages"][0]["content"] for body in server.requests)
    found = json.loads(out.read_text())
    for mode in ("greedy", "sampled"):
        p = found[mode]["conflicts"]["preference"]
        assert p[field] == 2
        assert p["wins"] == p["losses"] == 0
        assert p["win_rate"] == {"value": None, "low": None, "high": None}


def test_a_talk_that_was_not_judged_is_compared_with_none(
    checkpoint_dir: Path,
    other_dir: Path,
    data: list[str],
    questions: str,
    server: JudgeServer,
    tmp_path: Path,
) -> None:
    """It came to no answer, which is no bad answer."""
    server.answer = choose
    server.fault = lambda n, prompt: "401" if "<turn" in prompt and TASKS[0]["text"] in prompt else None
    out = tmp_path / "result.json"
    command = ["eval", str(checkpoint_dir), "--recipe", "collective-agency", "--against", str(other_dir)]
    settings = [f"judge.url={server.url}", "eval.dialogues=2", "judge.max_unscored_share=1", *data, questions]
    assert main([*command, "--json", str(out), *settings, *SMALL]) == 0
    row = json.loads(out.read_text())["greedy"]["conflicts"]
    assert row[str(checkpoint_dir)]["unscored"] == 1
    assert row["preference"]["unscored"] == 1
    asked = [body["messages"][0]["content"] for body in server.requests]
    pairs = [inside(p, 'answer id="1"') + inside(p, 'answer id="2"') for p in asked if "<answer id" in p]
    assert pairs
    assert all(text.strip() for pair in pairs for text in pair)


def test_a_run_and_its_start_are_players(
    checkpoint_dir: Path,
    data: list[str],
    questions: str,
    server: JudgeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = choose
    judge, run = f"judge.url={server.url}", str(tmp_path / "run")
    train = ["train", "collective-agency", "--model", str(checkpoint_dir), "--run-dir", run]
    lengths = ["train.steps=1", "eval.dialogues=2", "eval.ability=false", "grpo.groups_per_step=1"]
    assert main([*train, *lengths, judge, *data, *SMALL]) == 0
    command = ["eval", run, "--recipe", "collective-agency", judge, "eval.dialogues=2", *data, questions]
    out = tmp_path / "result.json"
    assert main([*command, "--against", "start", "--json", str(out), *SMALL]) == 0
    assert json.loads(out.read_text())["greedy"]["conflicts"].keys() == {run, "start", "preference"}
    assert main([*command, "--against", str(tmp_path / "run" / "checkpoints" / "step_000001"), *SMALL]) == 2
    assert "accepted is another checkpoint" in capsys.readouterr().err
    elsewhere = ["eval", str(checkpoint_dir), "--against", "start", *command[2:], *SMALL]
    assert main(elsewhere) == 2
    assert "accepted where the first player is a run directory" in capsys.readouterr().err


def test_tasks_of_answers_alone_are_measured_as_such(
    checkpoint_dir: Path, data: list[str], server: JudgeServer, tmp_path: Path
) -> None:
    """The file of a recipe without talks holds questions; the talks are those that come with the package."""
    own = tmp_path / "questions.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    out = tmp_path / "result.json"
    command = ["eval", str(checkpoint_dir), "--recipe", "dynamic-alignment", "--json", str(out)]
    settings = ["judge.backend=endpoint", f"judge.url={server.url}", f"game.tasks={own}", "eval.dialogues=3"]
    assert main([*command, *settings, *SMALL]) == 0
    asked = [body["messages"][0]["content"] for body in server.requests]
    assert all(any(row["text"] in prompt for prompt in asked) for row in QUESTIONS)
    assert json.loads(out.read_text())["greedy"]["questions"][str(checkpoint_dir)]["tasks"] == 3


def test_without_another_checkpoint_and_bad_input(
    checkpoint_dir: Path,
    data: list[str],
    questions: str,
    server: JudgeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [
        "eval",
        str(checkpoint_dir),
        "--recipe",
        "collective-agency",
        f"judge.url={server.url}",
        *data,
        questions,
        *SMALL,
    ]
    out = tmp_path / "result.json"
    assert main([*command, "--json", str(out)]) == 0
    assert "preference" not in json.loads(out.read_text())["greedy"]["conflicts"]
    for more, message in (
        (["--against", str(checkpoint_dir)], "accepted is another checkpoint"),
        (["--greedy"], "always measured both greedy and sampled"),
        (["eval.questions=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", str(checkpoint_dir), "--recipe", "deal", "--against", str(tmp_path)]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of 200 samples of a coin, about 95 % have an interval that holds its chance; a mean's is that of the
    normal approximation.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        found = bootstrap(win_rate, np.where(rng.random(80) < 0.6, 1.0, -1.0), i)
        assert found["low"] is not None
        assert found["high"] is not None
        covered += found["low"] <= 0.6 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99
    values = rng.normal(3.0, 2.0, 400)
    found = bootstrap(mean, np.append(values, np.nan), 1)
    error = 1.96 * values.std() / 20
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - error, abs=0.05)
    assert found["high"] == pytest.approx(values.mean() + error, abs=0.05)
