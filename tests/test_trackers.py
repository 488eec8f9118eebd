"""What other programs show of a run: event files as TensorBoard reads them, calls of wandb, a terminal."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from duologue.grpo.cli import main
from duologue.grpo.commands.watch import BLOCKS, Lines, curve, last_dialogue, view
from duologue.grpo.config import load_config
from duologue.grpo.console import Progress
from duologue.grpo.run_dir import RunDir, read_lines
from duologue.grpo.trackers import Trackers, numbers
from duologue.grpo.trainer import train
from rich.console import Console
from test_watch import RUN


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trackers") / "run"
    config = load_config("text-game", [*RUN, "train.steps=3"])
    train(config, RunDir.create(path, config.to_toml()), Progress(quiet=True), threading.Event())
    return path


def lines_of(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / "metrics.jsonl")


def tracked(run: Path, folder: Path, rows: list[dict[str, Any]], *settings: str) -> None:
    """What a run with these settings would hand over."""
    trackers = Trackers(load_config("text-game", [*RUN, *settings]), folder)
    trackers.begin()
    for row in rows:
        trackers.log(row, next(d for d in read_lines(run / "dialogues.jsonl") if d["stage"] == "selfplay"))
    trackers.close()


def test_tensorboard_reads_the_metrics(run: Path, tmp_path: Path) -> None:
    """By its own reader; after a kill what the later steps had is not shown twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = lines_of(run)
    for part in (rows, rows[1:]):  # a process that was killed after step 2, and one that went on from step 1
        tracked(run, tmp_path, part, "train.tensorboard=true")
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    for name in ("reward", "entropy", "watch/turn_tokens"):
        events = seen.Scalars(f"selfplay/{name}")
        assert [event.step for event in events] == [0, 1, 2]
        plain = [dict(numbers(row))[name] for row in rows]
        assert [event.value for event in events] == pytest.approx(plain, rel=1e-6)
    (text,) = seen.Tensors("dialogue/text_summary")
    assert b"side 1: " in text.tensor_proto.string_val[0]


def test_a_run_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = ["train.steps=1", "train.tensorboard=true", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "text-game", *RUN, *settings]) == 0
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_wandb_is_given_each_line_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: it shows how wandb is called, not that wandb takes it."""
    begun: list[dict[str, Any]] = []
    given: list[tuple[int, dict[str, Any]]] = []
    ended: list[bool] = []
    wandb_run = SimpleNamespace(
        log=lambda data, step: given.append((step, data)), finish=lambda: ended.append(True)
    )

    def init(**settings: Any) -> Any:
        begun.append(settings)
        return wandb_run

    stand_in = SimpleNamespace(init=init, Html=lambda text: text, __spec__=SimpleNamespace(name="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]
    rows = lines_of(run)
    for part in (rows[:2], rows[1:]):
        tracked(run, tmp_path, part, "train.wandb=mine")
    assert [step for step, _ in given] == [0, 1, 1, 2]
    assert given[0][1]["selfplay/reward"] == rows[0]["reward"]
    assert given[0][1]["dialogue"].startswith("<pre>side 1: ")
    assert all("dialogue" not in data for _, data in given[1:])
    first, second = begun
    assert first == second  # the same run of wandb's
    assert (first["project"], first["resume"], first["dir"]) == ("mine", "allow", str(tmp_path))
    assert first["config"]["train"]["wandb"] == "mine"
    assert ended == [True, True]


def test_a_run_of_wandbs_is_that_folder_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same at a resume, elsewhere too; another where a run began anew in the same place."""
    begun: list[str] = []
    wandb_run = SimpleNamespace(log=lambda data, step: None, finish=lambda: None)

    def init(**settings: Any) -> Any:
        begun.append(settings["id"])
        return wandb_run

    stand_in = SimpleNamespace(init=init, __spec__=SimpleNamespace(name="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]
    run = tmp_path / "run"

    def begin(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        Trackers(load_config("text-game", [*RUN, "train.wandb=mine"]), folder).begin()
        return begun[-1]

    first = begin(run)
    assert begin(run) == first
    assert begin(run.rename(tmp_path / "moved")) == first
    assert begin(run) != first
    (tmp_path / "old" / "wandb").mkdir(parents=True)
    place = str((tmp_path / "old").resolve())
    assert (
        begin(tmp_path / "old") == hashlib.sha256(place.encode()).hexdigest()[:16]
    )  # as it was called before


def test_what_wandb_refuses_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class UsageError(Exception):
        """wandb's own have no base that is Python's."""

    def init(**settings: Any) -> Any:
        raise UsageError("No API key configured.\nUse `wandb login`")

    stand_in = SimpleNamespace(init=init, __spec__=SimpleNamespace(name="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]
    command = ["train", "text-game", *RUN, "--run-dir", str(tmp_path / "run")]
    assert main([*command, "train.wandb=mine"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("duologue: ")]
    assert line.startswith(
        "duologue: train.wandb = 'mine': No API key configured. Use `wandb login`; accepted"
    )
    assert main([*command, "train.steps=1"]) == 0  # the corrected command


def test_wandb_offline(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb itself: its file has each of the metrics by name."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked(run, tmp_path, lines_of(run), "train.wandb=mine")
    wandb.teardown()  # which writes what is on its way
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    written = record.read_bytes()
    assert all(name.encode() in written for row in lines_of(run) for name, _ in numbers(row))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    setting = {"tensorboard": "train.tensorboard=true", "wandb": "train.wandb=mine"}[name]
    with pytest.raises(
        ValueError, match=rf"train\.{name}: accepted with the package {name}, .*duologue\[{name}\]"
    ):
        Trackers(load_config("text-game", [*RUN, setting]), tmp_path)
    assert Trackers(load_config("text-game", [*RUN, setting]), tmp_path, first=False).wanted == set()


def test_numbers_of_a_line() -> None:
    row = {"a": 1, "b": {"c": 2.5, "d": {"e": True}}, "f": [3, 4], "g": None, "h": "text", "i": float("nan")}
    assert dict(numbers(row)) == {"a": 1.0, "b/c": 2.5, "b/d/e": 1.0, "f/0": 3.0, "f/1": 4.0}


# ---- in the terminal ---------------------------------------------------------------------------------------


def shown(run: Path, rows: list[Any]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(view(run, rows))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_watch_shows_the_latest_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(run, lines_of(run))
    rows = lines_of(run)
    assert "step 3 of 3" in text
    assert f"reward            {rows[-1]['reward']:.3f}" in text or f"{rows[-1]['reward']:.3f}" in text
    assert f"{rows[-1]['watch']['turn_tokens']:.1f}" in text
    rows[1]["watch"]["alarms"] = {"echo": "90% of what is said repeats the other side"}
    assert "warned after step 2: echo: 90% of what is said" in shown(run, rows)
    assert main(["watch", str(run), "--once"]) == 0
    assert "step 3 of 3" in capsys.readouterr().out


def test_watch_of_what_is_no_run_or_has_no_step(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "config.toml").write_text((run / "config.toml").read_text())
    assert "no step is done yet" in shown(tmp_path, [])


def test_lines_are_read_as_they_come(tmp_path: Path) -> None:
    """Half a line waits for its end; a file that a resume cut is read anew."""
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path)
    assert lines.read() == []
    path.write_text('{"step": 0}\n{"st')
    assert lines.read() == [{"step": 0}]
    path.write_text('{"step": 0}\n{"step": 1}\n')
    assert lines.read() == [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0}\n')
    assert lines.read() == [{"step": 0}]


def test_the_last_dialogue_is_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "dialogues.jsonl"
    assert last_dialogue(path) is None
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(3)) + '{"n"')
    assert last_dialogue(path) == {"n": 2}
    path.write_text(json.dumps({"n": "x" * 400_000}) + "\n")
    assert last_dialogue(path) is None  # it is longer than what is read


def test_a_curve_goes_from_the_least_to_the_most() -> None:
    assert curve([float(n) for n in range(8)]) == BLOCKS
    assert curve([2.0, 2.0]) == BLOCKS[0] * 2
    assert curve([1.0, 0.0, 0.5]) == "█▁" + BLOCKS[round(3.5)]
