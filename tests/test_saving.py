"""What is written of a run: room for it is looked for first, and what became damaged is gone behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from duologue.grpo.checkpoints import damage, write_state
from duologue.grpo.cli import main
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.run_dir import read_lines
from duologue.grpo.space import checkpoint_bytes, free_bytes, weight_bytes
from duologue.model.checkpoint import write_checkpoint
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.model.tokenizer import Tokenizer
from tiny import TINY_DEAL, decoder


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
    for name in ("model.safetensors", "optimizer.pt"):
        assert (third / name).read_bytes() == (whole / "checkpoints" / third.name / name).read_bytes()
    assert read_lines(run / "dialogues.jsonl") == read_lines(whole / "dialogues.jsonl")
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [0, 1, 2]
    flip(third / "model.safetensors")
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
