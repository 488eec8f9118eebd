"""The command line: exit codes, one clear line for each mistake, interruption by signals, and what each
command leaves.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from duologue.grpo.cli import main, split_overrides
from duologue.grpo.commands import doctor
from duologue.grpo.config import load_config
from duologue.grpo.console import Progress
from duologue.grpo.run_dir import read_lines
from tiny import TINY_DEAL


def train(path: Path, *more: str) -> list[str]:
    return ["train", "deal", *TINY_DEAL, "--run-dir", str(path), *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(train(path)) == 0
    return path


def fails(capsys: pytest.CaptureFixture[str], code: int, *argv: Any) -> str:
    """Run a command that must fail with `code`, and return its one line of error."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


# ---- words -------------------------------------------------------------------------------------------------


def test_settings_may_stand_anywhere_and_be_written_three_ways() -> None:
    argv = "train --train.seed 3 deal grpo.loss=grpo --run-dir a/b=c --model.path=x=y --resume game.name=deal"
    rest, overrides = split_overrides(argv.split())
    assert rest == ["train", "deal", "--run-dir", "a/b=c", "--resume"]
    assert overrides == ["train.seed=3", "grpo.loss=grpo", "model.path=x=y", "game.name=deal"]


def test_a_training_starts_without_the_compiler(tmp_path: Path) -> None:
    """torch._dynamo takes seconds to import, and much of torch asks for it at the first call: a run with all
    that has gradients, on its kernels, does without.
    """
    more = ["grpo.kl_coef=0.1", "grpo.imitation_coef=0.1", "train.kl_every=1"]
    argv = [*train(tmp_path / "run", *more), "train.gradient_accumulation_fusion=true"]
    code = f"import sys; from duologue.grpo.cli import main; code = main({argv}); print(code, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    ended, *modules = done.stdout.splitlines()[-1].split()
    assert ended == "0", done.stderr
    assert "torch.optim.adamw" in modules
    assert "torch._dynamo" not in modules


def test_help_and_bad_usage_answer_without_loading_torch() -> None:
    code = (
        "import sys; from duologue.grpo.cli import main; "
        "codes = [main(['--help']), main([]), main(['train']), main(['train', 'deal', '--bogus']), "
        "main(['sing'])]; "
        "sys.exit(codes != [0, 2, 2, 2, 2] or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unrecognized arguments: --bogus" in done.stderr
    assert "invalid choice: 'sing'" in done.stderr


def test_a_command_starts_without_the_compiler() -> None:
    """torch._dynamo takes longer to import than all of torch; nothing here is compiled."""
    code = "import sys, duologue.grpo.trainer; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("train deel", "unknown recipe 'deel': did you mean 'deal'"),
        ("train missing.toml", "there is no file missing.toml"),
        ("train deal grpo.group_sise=4", "unknown key grpo.group_sise: did you mean 'group_size'"),
        ("train deal --grpo.group_size many", "grpo.group_size = 'many': accepted is an integer"),
        ("train deal grpo.group_size=1", "grpo.group_size = 1: accepted is 2 to any"),
        ("train deal nonsense=1", "'nonsense=1': accepted is section.key=value"),
        ("train deal --train.seed", "--train.seed lacks a value"),
        ("train deal --resume", "--resume needs --run-dir"),
        ("train deal --device tpu", 'model.device = "tpu": accepted is cpu, cuda or cuda:N'),
        ("train deal --device cuda:77", "model.device = 'cuda:77': accepted is cpu or one of"),
        ("eval nowhere --recipe deal", "nowhere is not a checkpoint"),
        ("eval nowhere --recipe deal --dialogues 0", "eval.dialogues = 0: accepted is 1 to any"),
        ("report nowhere", "nowhere holds no run"),
        ("doctor train.seed=1", "doctor takes no settings, got train.seed=1"),
        ("config deel", "unknown recipe 'deel': did you mean 'deal'"),
        ("config deal gprpo", "unknown section [gprpo]: did you mean 'grpo'? accepted is one of model, game"),
        ("config deal grpo grpo.group_size=1", "grpo.group_size = 1: accepted is 2 to any"),
    ],
)
def test_bad_configuration_is_code_2_and_one_line(
    capsys: pytest.CaptureFixture[str], argv: str, says: str
) -> None:
    error = fails(capsys, 2, *argv.split())
    assert error.startswith("duologue: ")
    assert says in error


def test_config_prints_what_train_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["price", "grpo.group_size=4", "--train.seed", "3"]
    assert main(["config", *words]) == 0
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out)
    assert load_config(str(path)) == load_config("price", ["grpo.group_size=4", "train.seed=3"])
    assert main(["config", "price", "grpo", "grpo.group_size=4"]) == 0
    said = capsys.readouterr().out
    assert "group_size = 4" in said
    assert "# dialogues of one scenario (accepted: 2 to any)" in said
    assert "[train]" not in said


# ---- train -------------------------------------------------------------------------------------------------


def test_train_leaves_summary_report_and_says_where(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert "Held-out results" in (run / "report.html").read_text()
    capsys.readouterr()
    assert main(train(run, "--resume")) == 0
    said = capsys.readouterr().out
    assert "is finished already" in said
    assert "warm start" in said
    assert "joint score / best joint" in said
    assert str(run / "report.html") in said.replace("\n", "")


def test_a_finished_run_goes_on_when_it_is_made_longer(run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run, tmp_path / "longer")
    before = (path / "metrics.jsonl").read_bytes()
    assert main(train(path, "--resume", "train.steps=3")) == 0
    assert [row["step"] for row in read_lines(path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert (path / "metrics.jsonl").read_bytes().startswith(before)
    assert json.loads((path / "summary.json").read_text())["steps"] == 5


def test_a_run_that_is_another_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "holds another run" in fails(capsys, 2, *train(run))
    assert "train.seed = 0, not 9" in fails(capsys, 2, *train(run, "--resume", "train.seed=9"))
    assert "model.hidden_size = 32, not 64" in fails(
        capsys, 2, *train(run, "--resume", "model.hidden_size=64")
    )
    assert "holds no run to resume" in fails(capsys, 2, *train(tmp_path, "--resume"))


def test_settings_that_do_not_fit_each_other_leave_no_run_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    assert "model.max_position = 64 is below the" in fails(capsys, 2, *train(path, "model.max_position=64"))
    assert "rollout.cache_tokens = 32 is below the" in fails(
        capsys, 2, *train(path, "rollout.cache_tokens=32")
    )
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_saves_and_resume_finishes(
    number: signal.Signals,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run"
    before = signal.getsignal(number)
    update = Progress.update

    def interrupted(self: Progress, step: int, metrics: Any) -> None:
        update(self, step, metrics)
        signal.raise_signal(number)  # in this thread, so that it is heard before anything goes on

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupted)
        assert main(train(path)) == 130
    assert signal.getsignal(number) is before
    said = capfd.readouterr()
    assert "stopping after this step" in said.err
    assert f"--run-dir {path} --resume" in said.out.replace("\n", "")
    assert [row["step"] for row in read_lines(path / "metrics.jsonl")] == [0]
    assert (path / "checkpoints" / "step_000001").is_dir()
    assert not (path / "summary.json").exists()
    assert main(train(path, "--resume")) == 0
    assert read_lines(path / "dialogues.jsonl") == read_lines(run / "dialogues.jsonl")


@pytest.mark.parametrize("usual", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_signal_stops_at_once(usual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a shell has started it in the background, with SIGINT ignored."""

    def twice(self: Progress, step: int, metrics: Any) -> None:
        asks = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is asks:  # until it is heard: two at once are one
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)  # which the second one ends

    monkeypatch.setattr(Progress, "update", twice)
    before = signal.signal(signal.SIGINT, usual)
    try:
        assert main(train(tmp_path / "run")) == 130
        assert signal.getsignal(signal.SIGINT) is usual
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_full_disk_is_code_1_and_names_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # no file may grow beyond: EFBIG
        error = fails(capsys, 1, *train(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    assert error.startswith(f"duologue: the checkpoint {checkpoint} could not be written")
    assert error.endswith("there is none before it")
    assert not list(checkpoint.parent.iterdir())


def test_other_failures_are_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in fails(capsys, 1, *train(tmp_path / "file" / "run"))


def test_the_traceback_is_shown_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUOLOGUE_DEBUG", "1")
    assert main(["train", "deel"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.strip().splitlines()[-1].startswith("duologue: unknown recipe")


# ---- eval, report, doctor ----------------------------------------------------------------------------------


def test_eval_measures_a_checkpoint_as_training_did(run: Path, tmp_path: Path) -> None:
    """The same seed, scenarios and draws: the numbers of the summary, to the last bit."""
    checkpoint = run / "checkpoints" / "step_000004"
    assert (
        main(["eval", str(checkpoint), "--recipe", "deal", *TINY_DEAL, "--json", str(tmp_path / "all.json")])
        == 0
    )
    found = json.loads((tmp_path / "all.json").read_text())
    trained = json.loads((run / "summary.json").read_text())["trained"]
    assert {key: found[key] for key in trained} == trained
    assert (found["checkpoint"], found["split"], found["temperature"], found["seed"]) == (
        str(checkpoint),
        "heldout",
        1.0,
        0,
    )
    more = ["--dialogues", "7", "--greedy", "--json", str(tmp_path / "greedy.json")]
    more += ["--save-dialogues", str(tmp_path / "greedy.jsonl")]
    assert main(["eval", str(checkpoint), "--recipe", "deal", *TINY_DEAL, *more]) == 0
    greedy = json.loads((tmp_path / "greedy.json").read_text())
    assert (greedy["dialogues"], greedy["temperature"]) == (7, 0.0)
    held = [json.loads(line) for line in (tmp_path / "greedy.jsonl").read_text().splitlines()]
    assert len(held) == 7
    assert sum(d["outcome"]["agreed"] for d in held) / 7 == pytest.approx(greedy["agreement"])


def test_report_is_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!doctype html>")


def test_doctor_checks_the_promise_and_fails_when_it_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said
    assert "log-prob difference 0.0e+00: exact" in said or "PyTorch (the C++ kernels are not built)" in said
    monkeypatch.setattr(doctor, "largest_mismatch", lambda device: 1e-3)
    assert main(["doctor"]) == int(doctor.backend.available())
