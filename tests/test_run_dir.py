"""The run directory survives what happens to it: kills at any moment of a save, a full disk, two processes,
another run.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.config import load_config
from duologue.grpo.run_dir import RunDir, finished, iter_lines, read_lines
from safetensors.torch import save_file

TOML = '[train]\nsteps = 10\nseed = 0\n[grpo]\ngroup_size = 8\n[model]\npath = ""\n'
NAN = float("nan")

# A process that saves checkpoints of many files without end, one per "step", each whole or worthless.
SAVER = """
import sys
from pathlib import Path
from duologue.grpo.checkpoints import step_name
from duologue.grpo.run_dir import RunDir
run = RunDir.create(Path(sys.argv[1]), "")
def write(folder):
    for i in range(15):
        (folder / f"part{i}").write_text(str(step))
for step in range(1, 100_000):
    run.append_metrics({"step": step, "stage": "selfplay"})
    run.save_checkpoint(step_name(step), write, keep=2)
    print(step, flush=True)
"""


def child(code: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def make(path: Path, toml: str = TOML) -> RunDir:
    return RunDir.create(path / "run", toml)


# ---- another run, two processes ----------------------------------------------------------------------------


def test_a_directory_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    make(tmp_path).close()
    with pytest.raises(ValueError, match=r"run exists and holds another run.*--resume.*--run-dir"):
        make(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file exists and is a file"):
        RunDir.create(tmp_path / "file", TOML)
    (tmp_path / "empty").mkdir()
    RunDir.create(tmp_path / "empty", TOML).close()
    assert (tmp_path / "empty" / "config.toml").read_text() == TOML


def test_resume_names_every_setting_that_differs_and_both_values(tmp_path: Path) -> None:
    make(tmp_path).close()
    other = (
        TOML.replace("seed = 0", "seed = 3")
        .replace("group_size = 8", "group_size = 4")
        .replace("steps = 10", "steps = 12")
    )
    with pytest.raises(ValueError) as error:
        RunDir.resume(tmp_path / "run", other)
    assert "grpo.group_size = 8, not 4" in str(error.value)
    assert "train.seed = 0, not 3" in str(error.value)
    assert "train.steps" not in str(error.value)
    assert (tmp_path / "run" / "config.toml").read_text() == TOML


def test_a_run_may_be_made_longer_and_is_then_unfinished(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert not finished(run.path, TOML)
    run.write_summary({"trained": {"agreement": 1.0}})
    run.close()
    longer = TOML.replace("steps = 10", "steps = 20")
    assert finished(run.path, TOML)
    assert not finished(run.path, longer)
    RunDir.resume(run.path, longer).close()
    assert not finished(run.path, longer)  # the old summary does not stand for the longer run


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume"):
        RunDir.resume(tmp_path, TOML)


def test_only_one_process_writes_a_run(tmp_path: Path) -> None:
    process = child(SAVER, tmp_path / "run")
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ValueError, match=rf"in use by process {process.pid}$"):
            RunDir.resume(tmp_path / "run", "")
    finally:
        process.kill()
        process.communicate()
    RunDir.resume(tmp_path / "run", "").close()  # a dead process holds nothing


def test_the_saved_configuration_is_the_resolved_one(tmp_path: Path) -> None:
    config = load_config("deal", ["train.seed=5"])
    run = make(tmp_path, config.to_toml())
    assert load_config(str(run.path / "config.toml")) == config


# ---- lines -------------------------------------------------------------------------------------------------


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.append_metrics(
        {"step": 0, "stage": "selfplay", "kl": NAN, "deep": {"list": [1.5, float("inf"), (NAN, "é")]}}
    )
    row = {"step": 0, "stage": "selfplay", "kl": None, "deep": {"list": [1.5, None, [None, "é"]]}}
    assert read_lines(run.path / "metrics.jsonl") == [row]


def test_lines_after_the_checkpoint_are_cut_off_and_those_before_it_stay(tmp_path: Path) -> None:
    """Also lines of the checkpoint's own step: an evaluation that it has seen stays, one that it has not
    goes.
    """
    run = make(tmp_path)
    run.append_metrics({"step": 0, "stage": "imitation"})
    run.append_dialogues([{"step": 1, "stage": "eval", "policy": "warm_start"}])
    run.save_checkpoint("step_000001", lambda folder: None)
    kept = {name: (run.path / name).read_bytes() for name in ("metrics.jsonl", "dialogues.jsonl")}
    run.append_metrics({"step": 1, "stage": "selfplay"})
    run.append_dialogues(
        [{"step": 1, "stage": "selfplay"}, {"step": 1, "stage": "eval", "policy": "trained"}]
    )
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "sta')
    run.drop_lines_from(1)
    assert {name: (run.path / name).read_bytes() for name in kept} == kept
    run.append_metrics({"step": 1, "stage": "selfplay"})
    assert [row["step"] for row in read_lines(run.path / "metrics.jsonl")] == [0, 1]
    run.drop_lines_from(0)  # no checkpoint: from the beginning
    assert read_lines(run.path / "metrics.jsonl") == read_lines(run.path / "dialogues.jsonl") == []


def test_a_line_that_was_cut_off_is_no_line_yet(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_lines(path) == []
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert read_lines(path) == [{"a": 1}]
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl line 2"):
        list(iter_lines(path))


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_the_oldest_are_pruned_and_the_newest_by_number_is_taken(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.latest_checkpoint() is None
    run.save_checkpoint("warm_start", lambda folder: None)
    for step in (9, 10, 999_999, 1_000_000):
        run.save_checkpoint(f"step_{step:06d}", lambda folder: None, keep=2)
    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert names == ["step_1000000", "step_999999", "warm_start"]
    assert run.latest_checkpoint() == run.path / "checkpoints" / "step_1000000"


def test_a_save_that_fails_leaves_nothing_and_keeps_everything(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.save_checkpoint("step_000001", lambda folder: (folder / "model").write_text("one") and None)

    def fail(folder: Path) -> None:
        (folder / "model").write_text("two")
        raise RuntimeError("the writer broke")

    for name in ("step_000001", "step_000002"):  # in the place of another, and new
        with pytest.raises(
            OSError, match=rf"{name} could not be written \(the writer broke\).*step_000001, is whole"
        ):
            run.save_checkpoint(name, fail, keep=1)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step_000001"]
    assert (run.path / "checkpoints" / "step_000001" / "model").read_text() == "one"


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: writing fails with EFBIG, for real."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("writer", ["python", "safetensors", "torch"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path: Path, writer: str) -> None:
    """Each of the three that write a checkpoint says so in its own way."""
    weights = {"w": torch.zeros(100_000)}
    writers: dict[str, Callable[[Path], object]] = {
        "python": lambda folder: (folder / "model").write_bytes(b"x" * 400_000),
        "safetensors": lambda folder: save_file(weights, str(folder / "model.safetensors")),
        "torch": lambda folder: torch.save(weights, folder / "optimizer.pt"),
    }
    run = make(tmp_path)
    run.save_checkpoint("step_000001", lambda folder: (folder / "model").write_text("one") and None, keep=1)
    with (
        full_disk(200_000),
        pytest.raises(OSError, match=r"step_000002 could not be written .*step_000001, is whole"),
    ):
        run.save_checkpoint("step_000002", lambda folder: writers[writer](folder) and None, keep=1)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step_000001"]
    assert (run.path / "checkpoints" / "step_000001" / "model").read_text() == "one"


def test_a_line_that_no_longer_fits_is_named_and_cut_off_by_the_next_resume(tmp_path: Path) -> None:
    run = make(tmp_path)
    metrics = run.path / "metrics.jsonl"
    for step in range(150):
        run.append_metrics({"step": step, "stage": "selfplay", "text": "x" * 100})
    with (
        full_disk(metrics.stat().st_size + 20),
        pytest.raises(OSError, match=r"metrics\.jsonl could not be written"),
    ):
        run.append_metrics({"step": 150, "stage": "selfplay", "text": "x" * 100})
    assert len(read_lines(metrics)) == 150
    assert not metrics.read_bytes().endswith(b"\n")
    run.drop_lines_from(0)
    assert metrics.read_bytes() == b""


def test_kill_9_in_the_midst_of_saves(tmp_path: Path) -> None:
    """Whenever the process dies, the newest checkpoint is whole, no older than the last that was reported,
    and its lines fit.
    """
    for i in range(8):
        path = tmp_path / f"run{i}"
        process = child(SAVER, path)
        assert process.stdout is not None
        reported = int(process.stdout.readline())
        time.sleep(0.003 * i)
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
        reported = max([reported, *map(int, rest.split())])
        run = RunDir.resume(path, "")
        newest = run.latest_checkpoint()
        assert newest is not None
        step = int(newest.name.removeprefix("step_"))
        assert step >= reported
        for checkpoint in sorted((path / "checkpoints").iterdir())[-1:]:
            assert {(checkpoint / f"part{k}").read_text() for k in range(15)} == {str(step)}
        assert not list((path / "checkpoints").glob(".*"))
        run.drop_lines_from(step)
        assert [row["step"] for row in read_lines(path / "metrics.jsonl")] == list(range(1, step + 1))
        run.close()


def test_a_checkpoint_that_was_moved_aside_goes_back(tmp_path: Path) -> None:
    """Killed between the two renames that replace a checkpoint by one of the same name."""
    run = make(tmp_path)
    run.save_checkpoint("step_000004", lambda folder: (folder / "model").write_text("old") and None)
    folder = run.path / "checkpoints"
    (folder / "step_000004").rename(folder / ".step_000004.old")
    (folder / ".step_000004.abc.tmp").mkdir()
    run.close()
    run = RunDir.resume(run.path, TOML)
    assert [path.name for path in folder.iterdir()] == ["step_000004"]
    assert (folder / "step_000004" / "model").read_text() == "old"


def test_the_summary_is_json_and_replaces_the_last_one(tmp_path: Path) -> None:
    run = make(tmp_path)
    for seed in (1, 2):
        run.write_summary({"seed": seed, "train_seconds": NAN})
    assert json.loads((run.path / "summary.json").read_text()) == {"seed": 2, "train_seconds": None}
    assert not list(run.path.glob("*.tmp"))
