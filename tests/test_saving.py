"""What is written of a run: room for it is looked for first, a thread writes it while training goes on, and
what became damaged is gone behind.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from duologue.grpo import trainer
from duologue.grpo.checkpoints import damage, write_state
from duologue.grpo.cli import main
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.run_dir import read_lines
from duologue.grpo.space import BESIDE, checkpoint_bytes, free_bytes, weight_bytes
from duologue.grpo.trainer import Trainer
from duologue.model.checkpoint import on_host, write_checkpoint
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.model.tokenizer import Tokenizer
from tiny import TINY_DEAL, decoder

LONGER = ("train.steps=5", "train.keep_checkpoints=9")
BINARY = ("model.safetensors", "optimizer.pt")


def train(path: Path, *more: str) -> int:
    return main(["train", "deal", "--run-dir", str(path), *TINY_DEAL, "imitation.steps=1", *more])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("duologue: ")
    return error


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step of imitation and two of self-play, with a checkpoint after each."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert train(path) == 0
    return path


# ---- room on the disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_checkpoint_is_as_large_as_expected(
    dtype: torch.dtype, rank: int, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = decoder(vocab_size=4000).to(dtype)
    if rank:
        model = LoraDecoder(model, new_adapter(model, LoraSettings(rank=rank), 0))
    optimizer = Optimizer(model, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0)
    write_checkpoint(model, tiny_tokenizer, tmp_path)
    write_state(tmp_path, {}, optimizer.state_dict())
    (weights,) = (file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    state = (tmp_path / "optimizer.pt").stat().st_size
    assert 0 <= weights - weight_bytes(model) < 8_000  # names and shapes
    assert 0 <= weights + state - checkpoint_bytes(model) < 100_000


def with_free(monkeypatch: pytest.MonkeyPatch, free: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free(path)))


def test_what_is_free_is_asked_where_the_folder_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, lambda path: 7 if path == tmp_path else 0)
    assert free_bytes(tmp_path / "a" / "b") == 7


def test_a_run_that_has_no_room_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with_free(monkeypatch, lambda path: 1_000_000)
    assert train(run) == 1
    error = said(capsys)
    assert "the run, which keeps 2 checkpoints, needs 3" in error
    assert error.endswith(f" MB in {run}, where 1.0 MB are free\n")
    assert not run.exists()


def test_a_save_that_has_no_room_leaves_what_was_there(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    second = run / "checkpoints" / "step_000002"
    with monkeypatch.context() as patch:
        with_free(patch, lambda path: 0 if second.is_dir() else 10**9)
        assert train(run) == 1
    error = said(capsys)
    assert "step_000003 could not be written (it needs 3" in error
    assert f"where 0.0 MB are free); the previous one, {second}, is whole\n" in error
    assert not damage(second)
    assert train(run, "--resume") == 0
    assert read_lines(run / "dialogues.jsonl") == read_lines(whole / "dialogues.jsonl")


FULL = """
mount -t tmpfs -o size=$1 tmpfs "$2" || exit 77
shift
folder=$1 out=$2
shift 2
"$@"
code=$?
cp -a "$folder/run" "$out"
exit $code
"""


def test_a_disk_that_fills_up(whole: Path, tmp_path: Path) -> None:
    """A real one, in memory, with room for what is expected and none for more: texts are not expected."""
    files = {name: (whole / f"checkpoints/step_000003/{name}").stat().st_size for name in BINARY}
    size = BESIDE + 3 * sum(files.values()) + files["model.safetensors"] + 20_000
    disk, out = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    words = ["train", "deal", "--run-dir", str(disk / "run"), *TINY_DEAL, "imitation.steps=1", *LONGER[:1]]
    duologue = [sys.executable, "-m", "duologue.grpo.cli", *words]
    command = ["unshare", "-Urm", "sh", "-c", FULL, "sh", str(size), str(disk), str(out), *duologue]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if not out.is_dir():
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"duologue: the checkpoint {disk}/run/checkpoints/step_00000")
    assert " MB are free); the previous one, " in line
    left = sorted((out / "checkpoints").glob("step_*"))
    assert left
    assert not any(damage(folder) for folder in left)
    assert train(out, *LONGER[:1], "--resume") == 0  # with room


# ---- a damaged checkpoint ----------------------------------------------------------------------------------


def flip(file: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_run_goes_on_from_before_a_damaged_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    second, third = (run / "checkpoints" / f"step_00000{step}" for step in (2, 3))
    (run / "summary.json").unlink()
    flip(third / "optimizer.pt")
    damaged = (third / "optimizer.pt").read_bytes()
    assert train(run, "--resume") == 2
    error = said(capsys)
    assert f"the checkpoint {third} is damaged (optimizer.pt: " in error
    assert "or use --from-previous" in error
    assert train(run, "--resume", "--from-previous") == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"{third} is damaged (optimizer.pt: " in shown
    assert f"the run goes on from {second}" in shown
    assert (third.with_name("damaged_step_000003") / "optimizer.pt").read_bytes() == damaged
    for name in BINARY:
        assert (third / name).read_bytes() == (whole / "checkpoints" / third.name / name).read_bytes()
    assert read_lines(run / "dialogues.jsonl") == read_lines(whole / "dialogues.jsonl")
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [0, 1, 2]
    flip(third / "model.safetensors")
    tokenizer = third / "tokenizer.json"  # which the lines of dialogues are read with, too
    tokenizer.write_bytes(tokenizer.read_bytes()[:200])
    assert train(run, "--resume", "--from-previous", "train.steps=3") == 0
    assert {path.name for path in third.parent.glob("damaged_*")} == {
        "damaged_step_000003",
        "damaged_step_000003.1",
    }


def test_without_a_whole_checkpoint_nothing_is_put_aside(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for folder in (run / "checkpoints").glob("step_*"):
        flip(folder / "model.safetensors")
    before = sorted(run.rglob("*"))
    assert train(run, "--resume", "--from-previous", "train.steps=3") == 2
    assert "step_000003 is damaged (model.safetensors: " in (error := said(capsys))
    assert "no checkpoint before it is whole" in error
    assert sorted(run.rglob("*")) == before
    assert train(run.with_name("other"), "--from-previous") == 2
    assert said(capsys) == "duologue: --from-previous goes with --resume\n"


# ---- while training goes on --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_copy_is_written_as_the_model_was(
    tied: bool, rank: int, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = decoder(tie_word_embeddings=tied).to(torch.bfloat16)
    if rank:
        model = LoraDecoder(model, new_adapter(model, LoraSettings(rank=rank), 0))
    copied = on_host(model)
    for folder in (tmp_path / "model", tmp_path / "copy"):
        folder.mkdir()
    write_checkpoint(model, tiny_tokenizer, tmp_path / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    write_checkpoint(copied, tiny_tokenizer, tmp_path / "copy")
    expected, found = (
        {file.name: file.read_bytes() for file in folder.iterdir()} for folder in sorted(tmp_path.iterdir())
    )
    assert expected == found


Write = Callable[..., None]


def with_writer(monkeypatch: pytest.MonkeyPatch, writer: Callable[[Path, Write], None]) -> None:
    """`writer(folder, write)` stands where a checkpoint's state is written."""
    real = trainer.write_state
    monkeypatch.setattr(
        trainer,
        "write_state",
        lambda folder, *state: writer(folder, lambda: real(folder, *state)),
    )


def steps_taken(run: Path) -> int:
    return len(read_lines(run / "metrics.jsonl"))


def until(reached: Callable[[], bool]) -> None:
    ends = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of six steps, with all checkpoints."""
    path = tmp_path_factory.mktemp("longer") / "run"
    assert train(path, *LONGER) == 0
    return path


def test_steps_are_taken_while_a_checkpoint_is_written(
    longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it holds what was there when it was begun; the next one waits for it."""
    run = tmp_path / "run"
    writing: list[Path] = []
    begun: list[int] = []

    def slow(folder: Path, write: Write) -> None:
        writing.append(folder)
        assert len(writing) == 1
        step = int(folder.name.removesuffix(".tmp")[-6:])
        begun.append(step)  # that of imitation's end twice: before it is measured, and after
        until(lambda: steps_taken(run) > step or step == 6 or begun == [1])
        write()
        writing.remove(folder)

    with_writer(monkeypatch, slow)
    assert train(run, *LONGER) == 0
    for step in range(1, 7):
        a, b = (path / "checkpoints" / f"step_00000{step}" for path in (longer, run))
        for name in BINARY:
            assert (a / name).read_bytes() == (b / name).read_bytes()
    assert read_lines(run / "dialogues.jsonl") == read_lines(longer / "dialogues.jsonl")
    # Lines are cut to where a checkpoint was begun, not to where it was whole.
    shutil.rmtree(run / "checkpoints" / "step_000006")
    assert train(run, *LONGER, "--resume") == 0
    assert read_lines(run / "dialogues.jsonl") == read_lines(longer / "dialogues.jsonl")


def test_a_save_that_fails_ends_the_run_at_its_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def failing(folder: Path, write: Write) -> None:
        if "step_000002" in folder.name:
            raise OSError("the disk is gone")
        write()

    with_writer(monkeypatch, failing)
    assert train(run, *LONGER) == 1
    error = said(capsys)
    second, first = (run / "checkpoints" / f"step_00000{step}" for step in (2, 1))
    assert f"the checkpoint {second} could not be written (the disk is gone); the previous one" in error
    assert f"{first}, is whole" in error
    assert 2 <= steps_taken(run) < 6
    assert not damage(first)


def test_an_error_of_training_is_said_when_a_save_has_come_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, failed, begun = tmp_path / "run", threading.Event(), []

    def failing(self: Trainer) -> Any:
        failed.set()
        raise RuntimeError("the judge is gone")

    def slow(folder: Path, write: Write) -> None:
        begun.append(folder)
        if "step_000001" in folder.name and len(begun) > 1:  # the warm start has been measured
            assert failed.wait(120)
        write()

    with_writer(monkeypatch, slow)
    monkeypatch.setattr(Trainer, "selfplay_step", failing)
    monkeypatch.setattr(Trainer, "_evaluate", lambda self, name: {"agreement": 0.0})
    assert train(run) == 1
    assert said(capsys) == "duologue: the judge is gone\n"
    assert not damage(run / "checkpoints" / "step_000001")


KILLED_WHILE_SAVING = """
import os, signal, sys, time
from pathlib import Path
from duologue.grpo import trainer
from duologue.grpo.cli import main
from duologue.grpo.run_dir import read_lines
write = trainer.write_state
run = Path(sys.argv[1])
def killed(folder, *state):
    write(folder, *state)
    if "step_000003" in folder.name:
        while len(read_lines(run / "metrics.jsonl")) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
trainer.write_state = killed
sys.exit(main(sys.argv[2:]))
"""


def test_a_kill_while_a_checkpoint_is_written_changes_nothing(longer: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "deal", "--run-dir", str(run), *TINY_DEAL, "imitation.steps=1", *LONGER]
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(run), *words]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"warm_start", "step_000001", "step_000002", ".step_000003.tmp"}
    assert train(run, *LONGER, "--resume") == 0
    assert read_lines(run / "dialogues.jsonl") == read_lines(longer / "dialogues.jsonl")
    for name in BINARY:
        a, b = (path / "checkpoints" / "step_000006" / name for path in (longer, run))
        assert a.read_bytes() == b.read_bytes()
