"""`collective-agency` and `dynamic-alignment` end to end: a Qwen3 checkpoint with its real chat template, a
real HTTP judge.
"""

from __future__ import annotations

import html
import json
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_core
from duologue.grpo.cli import main
from duologue.grpo.run_dir import read_lines
from duologue.kernels import backend
from duologue.rollout.judge import endpoint as endpoints
from judge_server import ASPECTS, FAULTS, JudgeServer, inside, scores
from safetensors.torch import load_file

DILEMMAS = [
    {"id": "d1", "text": "A colleague hides a mistake. Do you tell?"},
    {"id": "d2", "text": "The last seat on the bus: whose is it?"},
    {"id": "d3", "text": "A friend's gift is ugly. What do you say?"},
]
PAIRS = [
    {
        "id": "cost",
        "first": {"name": "Ada", "instructions": "Spend little."},
        "second": {"name": "Bo", "instructions": "Buy well."},
    },
    {
        "id": "time",
        "first": {"name": "Cy", "instructions": "Be quick."},
        "second": {"name": "Di", "instructions": "Be sure."},
    },
]
TASKS = [
    {**PAIRS[0], "id": "t1", "text": "Mend the roof now or save?"},
    {**PAIRS[1], "id": "t2", "text": "Sell the house?"},
]
SMALL = [
    "train.steps=3",
    "train.save_every=1",
    "train.kl_every=2",
    "grpo.group_size=3",
    "grpo.groups_per_step=2",
    "dialogue.max_rounds=2",
    "dialogue.max_tokens_per_turn=10",
    "dialogue.max_tokens_final=12",
    "eval.dialogues=3",
    "eval.ability=false",
    "rollout.cache_tokens=32768",
    "grpo.learning_rate=1e-3",
    "judge.deadline_s=120",
    "judge.timeout_s=30",
]


@pytest.fixture(scope="module")
def checkpoint_dir(chat_checkpoint: Path) -> Path:
    return chat_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    found = []
    for key, rows in (("dilemmas", DILEMMAS), ("personas", PAIRS), ("tasks", TASKS)):
        (folder / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(f"game.{key}={folder / key}.jsonl")
    return found


Run = Callable[..., int]


@pytest.fixture
def run(checkpoint_dir: Path, data: list[str], judge_server: JudgeServer, tmp_path: Path) -> Run:
    """run(name, *settings) -> the exit code of `duologue train collective-agency` there."""

    def go(name: str, *more: str, recipe: str = "collective-agency") -> int:
        words = [
            "train",
            recipe,
            "--model",
            str(checkpoint_dir),
            "--run-dir",
            str(tmp_path / name),
            *SMALL,
            *data,
        ]
        words += ["--judge.url", judge_server.url] if recipe == "collective-agency" else []
        return main([*words, *more])

    return go


def dialogues(path: Path, stage: str = "selfplay") -> list[dict[str, Any]]:
    return [d for d in read_lines(path / "dialogues.jsonl") if d["stage"] == stage]


def final(dialogue: dict[str, Any]) -> str | None:
    texts = [turn["text"] for turn in dialogue["turns"] if turn["kind"] == "final"]
    assert len(texts) <= 1
    return texts[0] if texts else None


def expected_reward(dialogue: dict[str, Any]) -> float:
    text = final(dialogue)
    return sum(scores(text)) / 4 if dialogue["outcome"]["agreed"] and text is not None else 0.0


def check_dialogues(found: list[dict[str, Any]]) -> None:
    """Every reward is the server's score of that very text, or 0 without an agreement, and rounds are
    counted.
    """
    assert found
    for d in found:
        assert d["reward"] == [expected_reward(d)] * 2
        talk = [turn for turn in d["turns"] if turn["kind"] == "utterance"]
        assert d["outcome"]["rounds"] == len(talk) / 2 <= 2
        assert [turn["role"] for turn in talk] == [0, 1] * d["outcome"]["rounds"]
        assert d["outcome"]["agreed"] == (d["outcome"]["failure"] is None)
        assert [p["name"] for p in d["personas"]] in (["Ada", "Bo"], ["Cy", "Di"])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "checkpoints" / "step_000003" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_three_steps_with_known_scores_and_again_without_a_request(
    run: Run, judge_server: JudgeServer, tmp_path: Path, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("DUOLOGUE_JUDGE_KEY", key)
    assert run("first") == 0
    assert {head["Authorization"] for head in judge_server.heads} == {f"Bearer {key}"}
    assert not any(
        key.encode() in file.read_bytes() for file in (tmp_path / "first").rglob("*") if file.is_file()
    )
    first = tmp_path / "first"
    played, evaluated = dialogues(first), dialogues(first, "eval")
    assert len(played) == 3 * 6
    assert len(evaluated) == 2 * 3
    check_dialogues(played)
    check_dialogues(evaluated)
    assert {d["outcome"]["agreed"] for d in played} == {True, False}
    assert all(final(d) is not None for d in evaluated)  # in evaluation it is written in any case
    assert all((final(d) is not None) == d["outcome"]["agreed"] for d in played)
    metrics = read_lines(first / "metrics.jsonl")
    assert len(metrics) == 3
    assert any(row["grad_norm"] > 0 for row in metrics)
    assert all(row["mismatch"] <= (0.0 if backend.available() else 1e-4) for row in metrics)
    talks = [d for d in played if d["step"] == 0]  # asked after each round, and of finals
    asked = sum(d["outcome"]["rounds"] + (final(d) is not None) for d in talks)
    assert metrics[0]["judge_asked"] + metrics[0]["judge_hits"] == asked
    assert all(
        row["unscored_share"] == 0 and row["judge_asked"] > 0 and row["judge_seconds"] > 0 for row in metrics
    )
    assert not same(weights(first), load_file(checkpoint_dir / "model.safetensors"))
    assert all(d["advantage"][1] == 0 for d in played)  # side 1 is frozen
    for i in range(0, len(played), 3):  # (r - mean) / std of a group
        rewards = torch.tensor([d["reward"][0] for d in played[i : i + 3]], dtype=torch.float64)
        assert len({d["scenario"]["id"] for d in played[i : i + 3]}) == 1
        expected = torch.zeros(3) if rewards.std() == 0 else (rewards - rewards.mean()) / rewards.std()
        assert [d["advantage"][0] for d in played[i : i + 3]] == pytest.approx(expected.tolist(), rel=1e-3)
    asked = len(judge_server.requests)
    assert asked > 30
    prompts = [body["messages"][0]["content"] for body in judge_server.requests]
    assert len(set(prompts)) == asked
    assert not any("<think>" in prompt for prompt in prompts)
    report = (first / "report.html").read_text()
    assert all(
        row["text"] in html.unescape(report)
        for row in TASKS
        if row["id"] in {d["scenario"]["id"] for d in evaluated}
    )
    assert "rounds to agreement" in report

    assert run("second", f"judge.ledger={first / 'judge.sqlite'}", "judge.offline=true") == 0
    assert len(judge_server.requests) == asked
    assert dialogues(tmp_path / "second") == played
    assert same(weights(first), weights(tmp_path / "second"))


@pytest.mark.parametrize("fault", [*FAULTS, "all"])
def test_faults_lose_and_misread_no_dialogue(
    run: Run, judge_server: JudgeServer, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault alone hits a fifth of the requests; "all": every fault hits a fifth, so that five of six
    requests fail.
    """
    monkeypatch.setattr(endpoints, "_BACKOFF", lambda state: min(0.02 * 2**state.attempt_number, 0.3))
    rng = random.Random(0)
    faults = FAULTS if fault == "all" else (fault,)
    judge_server.fault = lambda n, prompt: next((name for name in faults if rng.random() < 0.2), None)
    sizes = [
        "train.steps=2",
        "eval.dialogues=6",
    ]  # that all of six are unscored, which stops a run, is improbable enough
    ends = run("run", *sizes, "judge.timeout_s=0.3", "judge.deadline_s=15", "judge.max_unscored_share=0.9")
    assert ends == 0
    found = dialogues(tmp_path / "run")
    assert len(found) == 2 * 6
    scored = [d for d in found if d["reward"] is not None]
    check_dialogues(scored)
    for d in found:
        assert (d["reward"] is None) == (d["outcome"]["failure"] == "unscored") == (d["advantage"] is None)
    for row, step in zip(read_lines(tmp_path / "run" / "metrics.jsonl"), (0, 1), strict=True):
        assert (
            row["unscored"]
            == sum(d["reward"] is None for d in found if d["step"] == step)
            == 6 * row["unscored_share"]
        )
        assert row["judge_asked"] > 0
        assert row["judge_seconds"] > 0
        assert row["rollout_tokens_per_s"] > 0
    assert len(scored) == len(found) or fault == "all"


def test_too_many_unscored_dialogues_stop_the_run_which_then_goes_on(
    run: Run, judge_server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("whole") == 0
    asked = len(judge_server.requests)
    judge_server.requests.clear()
    judge_server.fault = lambda n, prompt: "401" if n >= asked // 2 else None
    capsys.readouterr()
    assert run("broken") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "dialogues are unscored, above judge.max_unscored_share = 0.1" in error
    assert "HTTP 401" in error
    assert "--resume" in error
    assert not (tmp_path / "broken" / "summary.json").exists()
    judge_server.fault = lambda n, prompt: None
    before = len(judge_server.requests)
    kept = (
        sqlite3.connect(tmp_path / "broken" / "judge.sqlite")
        .execute("SELECT count(*) FROM answers")
        .fetchone()[0]
    )
    assert kept > 10
    assert run("broken", "--resume") == 0
    assert len(judge_server.requests) - before == asked - kept
    assert dialogues(tmp_path / "broken") == dialogues(tmp_path / "whole")
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))


def test_the_policy_learns_to_say_what_the_judge_likes(
    run: Run, judge_server: JudgeServer, tmp_path: Path
) -> None:
    """The judge wants the letter e in the words of side 1, which alone are trained; side 2 speaks with the
    same weights.
    """

    def likes_e(prompt: str) -> dict[str, Any]:
        said = [inside(prompt, f'turn speaker="{side}"') for side in (1, 2)]
        if "<completion>" not in prompt:
            words = [turns[-1].split() for turns in said]
            return {
                "agreed": all(words),
                "assent": {str(i + 1): words[i][0] if all(words) else "" for i in (0, 1)},
            }
        return dict.fromkeys(ASPECTS, min(5, said[0][0].count("e"))) | {"reason": "e"}

    judge_server.answer = likes_e
    settings = [
        "train.steps=25",
        "train.save_every=25",
        "train.kl_every=0",
        "grpo.group_size=8",
        "grpo.learning_rate=5e-3",
    ]
    assert (
        run("run", *settings, "judge.show_dialogue=true", "dialogue.max_rounds=1", "dialogue.temperature=1.0")
        == 0
    )
    rewards = [row["reward"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rewards[-5:]) > 5 * sum(rewards[:5]) + 2.5


def test_kill_9_and_resume_gives_the_same_run(
    run: Run, judge_server: JudgeServer, tmp_path: Path, checkpoint_dir: Path, data: list[str]
) -> None:
    assert run("whole", "judge.model=known") == 0
    path = tmp_path / "killed"
    words = [
        "train",
        "collective-agency",
        "--model",
        str(checkpoint_dir),
        "--run-dir",
        str(path),
        *SMALL,
        *data,
    ]
    words += ["--judge.url", judge_server.url, "judge.model=known"]
    stalled = threading.Event()  # so that it dies with questions on the wire

    def stall(n: int, prompt: str) -> str | None:
        if len(read_lines(path / "metrics.jsonl")) < 2:
            return None
        stalled.set()
        return "stall"

    judge_server.fault = stall
    code = "import sys; from duologue.grpo.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert stalled.wait(300), process.stderr and process.stderr.read()
    process.kill()
    assert process.wait() == -9, process.stderr and process.stderr.read()
    judge_server.fault = lambda n, prompt: None
    assert main([*words, "--resume"]) == 0
    assert same(weights(path), weights(tmp_path / "whole"))
    assert read_lines(path / "dialogues.jsonl") == read_lines(tmp_path / "whole" / "dialogues.jsonl")


def test_unscored_dialogues_move_nothing(run: Run, judge_server: JudgeServer, tmp_path: Path) -> None:
    """A run whose judge never scores what agreed learns from nothing: all others have the same reward, 0."""
    training = {row["text"] for row in DILEMMAS}
    judge_server.fault = lambda n, prompt: (
        "seven" if "<completion>" in prompt and inside(prompt, "dilemma")[0] in training else None
    )
    half = [
        "judge.max_unscored_share=0.9",
        "train.steps=1",
        "grpo.group_size=6",
        "judge.deadline_s=0.5",
        "dialogue.max_rounds=1",
    ]
    assert run("run", *half) == 0
    found = dialogues(tmp_path / "run")
    assert {d["reward"] is None for d in found} == {True, False}
    assert all(d["outcome"]["agreed"] for d in found if d["reward"] is None)
    (row,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert row["grad_norm"] == 0
    assert row["unscored"] == sum(d["reward"] is None for d in found)


@pytest.mark.parametrize(
    "settings", [["dialogue.context=full"], ["grpo.train_roles=both", "dialogue.first_speaker=alternate"]]
)
def test_other_protocols_train_too(
    run: Run, tmp_path: Path, checkpoint_dir: Path, settings: list[str], capsys: Any
) -> None:
    code = run("run", "train.steps=2", *settings)
    if settings == ["dialogue.context=full"]:  # Qwen3's own template drops thoughts from the history
        assert code == 2
        assert "the chat template rewrites turn 2" in capsys.readouterr().err
        return
    assert code == 0
    firsts = [d["turns"][0]["role"] for d in dialogues(tmp_path / "run")]
    assert firsts == [0] * 3 + [1] * 3 + [1] * 3 + [0] * 3
    assert any(d["advantage"][1] != 0 for d in dialogues(tmp_path / "run"))


def test_lora_on_a_frozen_base(run: Run, tmp_path: Path, checkpoint_dir: Path) -> None:
    assert run("run", "train.steps=2", "lora.rank=4", "lora.alpha=64", "grpo.kl_coef=0.05") == 0
    check_dialogues(dialogues(tmp_path / "run"))
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert any(row["grad_norm"] > 0 for row in rows)
    adapter = load_file(tmp_path / "run" / "checkpoints" / "step_000002" / "adapter_model.safetensors")
    assert any(bool(b.any()) for name, b in adapter.items() if "lora_B" in name)


# ---- dynamic-alignment -------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["lora.rank=4"]])
def test_the_policy_scores_its_own_answers_by_its_starting_weights(
    run: Run, tmp_path: Path, checkpoint_dir: Path, data: list[str], more: list[str]
) -> None:
    from duologue.model.checkpoint import load_model
    from duologue.rollout.engine.engine import Engine
    from duologue.rollout.judge.judge import FeedbackJudge
    from duologue.rollout.judge.ledger import Ledger
    from duologue.rollout.judge.model import ModelJudge
    from duologue.rollout.judge.questions import SCORE, Case, load_prompt

    settings = ["train.steps=2", "grpo.learning_rate=1e-2", "judge.readings=2", *more]
    assert run("run", *settings, recipe="dynamic-alignment") == 0
    found = dialogues(tmp_path / "run")
    assert len(found) == 2 * 6
    for d in found:
        assert [(turn["role"], turn["kind"]) for turn in d["turns"]] == [(0, "final")]
        assert d["outcome"]["agreed"]
        assert d["outcome"]["rounds"] == 0
        assert d["reward"] is not None
    assert len({tuple(d["reward"]) for d in found}) > 1
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["grad_norm"] > 0

    engine, tokenizer = load_model(checkpoint_dir, "cpu", torch.float32)
    backend = ModelJudge(lambda: (Engine(engine, cache_tokens=16384), tokenizer), readings=2)
    prompts = {SCORE: load_prompt(SCORE, held=True)}
    judge = FeedbackJudge(backend, Ledger(tmp_path / "fresh.sqlite"), prompts, held=True)
    for i, d in enumerate(found):
        judge.submit(SCORE, Case(dilemma=d["scenario"]["shared"], completion=d["turns"][0]["text"]), i)
    answers: dict[int, Any] = {}
    while len(answers) < len(found):
        answers |= dict(judge.answered(wait=True))
    judge.close()
    for i, d in enumerate(found):  # the frozen start, though the policy has moved
        assert d["reward"][0] == sum(answers[i][aspect] for aspect in ASPECTS) / 4
    offline = [f"judge.ledger={tmp_path / 'run' / 'judge.sqlite'}", "judge.offline=true"]
    assert run("again", *settings, *offline, recipe="dynamic-alignment") == 0
    assert dialogues(tmp_path / "again") == found


def test_settings_that_do_not_go_together_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for settings, says in (
        (["judge.backend=rules"], 'judge.backend = "rules": accepted is'),
        (["judge.url="], "judge.url = ''"),
        (["judge.url=http://user:secret-word@127.0.0.1/v1"], "judge.url takes none"),
        (["judge.url=localhost:8000"], 'judge.url = "localhost:8000"'),
        (['grpo.train_kinds=["utterance", "final"]'], "dialogue.final_temperature"),
        (["game.tasks=none.jsonl"], "there is no file none.jsonl"),
        (["imitation.steps=3"], "imitation.steps = 3: accepted is 0 with dilemmas"),
        (["rollout.cache_tokens=256"], "rollout.cache_tokens = 256 is below the"),
    ):
        capsys.readouterr()
        assert run("run", *settings) == 2
        error = capsys.readouterr().err
        assert says in error
        assert "secret-word" not in error
        assert not (tmp_path / "run").exists()
    assert (
        main(["train", "deal", "--judge.url", "http://127.0.0.1:1/v1", "--run-dir", str(tmp_path / "run")])
        == 2
    )


def test_rewards_of_a_finished_run_come_from_its_files_alone(
    run: Run, judge_server: JudgeServer, tmp_path: Path
) -> None:
    from duologue.rollout.games.game import Persona
    from duologue.rollout.judge.endpoint import Endpoint
    from duologue.rollout.judge.judge import FeedbackJudge
    from duologue.rollout.judge.ledger import Ledger
    from duologue.rollout.judge.questions import SCORE, Case, load_prompt

    assert run("run", "train.steps=2", "judge.show_dialogue=true", "judge.model=known") == 0
    judge_server.shutdown()
    ledger = Ledger(tmp_path / "run" / "judge.sqlite")
    backend, prompts = Endpoint("http://127.0.0.1:9", "known"), {SCORE: load_prompt(SCORE)}
    judge = FeedbackJudge(backend, ledger, prompts, show_dialogue=True, offline=True)
    agreed = [d for d in dialogues(tmp_path / "run") if d["outcome"]["agreed"]]
    for i, d in enumerate(agreed):
        talk = tuple((turn["role"], turn["text"]) for turn in d["turns"] if turn["kind"] == "utterance")
        personas = tuple(Persona(**persona) for persona in d["personas"])
        judge.submit(
            SCORE,
            Case(dilemma=d["scenario"]["shared"], personas=personas, turns=talk, completion=final(d) or ""),
            i,
        )
    answers = dict(judge.answered(wait=True))
    judge.close()
    assert [sum(answers[i][aspect] for aspect in ASPECTS) / 4 for i in range(len(agreed))] == [
        d["reward"][0] for d in agreed
    ]


# ---- a server that is not ours -----------------------------------------------------------------------------

KNOWN = {"knowledge": 3, "benevolence": 2, "power": 5, "vitality": 1, "reason": "by heart", "agreed": False}


def by_heart(folder: Path) -> Path:
    """A Qwen3 checkpoint that says `KNOWN` and stops, whatever it is asked: one token for the answer, which
    every token calls for.
    """
    import transformers
    import trl

    folder.mkdir()
    write_core(
        folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"], (json.dumps(KNOWN),)
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja", folder / "chat_template.jinja")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    say, end = tokenizer.convert_tokens_to_ids([json.dumps(KNOWN), "<|im_end|>"])
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=8192,
        eos_token_id=end,
        bos_token_id=None,
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name))
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[say] = torch.eye(16)[1]
        model.lm_head.weight[say, 0] = model.lm_head.weight[end, 1] = 10
    model.save_pretrained(folder)
    return folder


def test_a_frozen_checkpoint_in_this_process_is_a_judge(
    checkpoint_dir: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "collective-agency",
        "--model",
        str(checkpoint_dir),
        *SMALL,
        *data,
        "train.steps=1",
        "judge.backend=model",
    ]
    judged = [*words, f"judge.model={checkpoint_dir}"]
    assert main([*judged, "--run-dir", str(tmp_path / "run"), "judge.threshold=1"]) == 0
    for d in dialogues(tmp_path / "run"):  # it is never as sure as that
        assert (d["outcome"]["rounds"], d["outcome"]["failure"], d["reward"]) == (
            2,
            "no_agreement",
            [0.0, 0.0],
        )
    assert main([*judged, "--run-dir", str(tmp_path / "noise"), "judge.threshold=0"]) == 0
    for d in dialogues(tmp_path / "noise"):  # noise, and an answer to everything
        assert d["outcome"]["failure"] in (None, "no_agreement")
        assert d["reward"] is not None
    assert main([*words, "--run-dir", str(tmp_path / "none")]) == 2
    assert "judge.model = ''" in capsys.readouterr().err


@pytest.fixture
def transformers_server(tmp_path: Path) -> Iterator[str]:
    """`transformers serve` on loopback with that model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    command = [sys.executable, "-c", start, "serve", str(by_heart(tmp_path / "judge")), "--device", "cpu"]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                    break
                except OSError:
                    assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


def test_transformers_serve_is_a_judge(run: Run, tmp_path: Path, transformers_server: str) -> None:
    settings = [
        "train.steps=1",
        f"judge.url={transformers_server}",
        f"judge.model={tmp_path / 'judge'}",
        "judge.timeout_s=30",
    ]
    assert run("alone", *settings, "judge.backend=endpoint", recipe="dynamic-alignment") == 0
    found = dialogues(tmp_path / "alone")
    assert len(found) == 6
    assert {tuple(d["reward"]) for d in found} == {(2.75, 2.75)}
    assert all(d["outcome"]["metrics"] == {key: KNOWN[key] for key in ASPECTS} for d in found)
    assert (
        run(
            "two", "dialogue.max_rounds=1", "--judge.url", transformers_server, *settings[2:], "train.steps=1"
        )
        == 0
    )
    for d in dialogues(tmp_path / "two"):
        assert (d["outcome"]["agreed"], d["outcome"]["failure"], d["reward"]) == (
            False,
            "no_agreement",
            [0.0, 0.0],
        )
