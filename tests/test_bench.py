"""bench/gpu_suite.py and bench/workload.py from their command lines, tiny, on the CPU and without a GPU."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from duologue.rollout.games.catalogue import kind_of
from duologue.rollout.games.deal import DealSettings
from duologue.rollout.games.selection import SelectionSettings
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
SUITE = [sys.executable, str(ROOT / "bench/gpu_suite.py")]


def test_dry_run_measures_every_kernel_beside_torch() -> None:
    done = subprocess.run([*SUITE, "--dry", "--no-tests"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    sides: dict[str, set[str]] = {}
    for row in summary["rows"]:
        assert not row["failed"], row
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        sides.setdefault(row["op"], set()).add(row["provider"])
    assert len(sides) >= 11
    assert [row["exact"] for row in summary["rollout"]] == [True, False]
    assert all("ours" in found and len(found) > 1 for found in sides.values())
    errors = [
        row["error"]
        for row in summary["rows"]
        if row["op"].startswith("head") and row["provider"].startswith("ours")
    ]
    assert max(errors) < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do() -> None:
    done = subprocess.run(SUITE, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no CUDA device; --dry" in done.stderr


def test_workload_counts_what_was_asked_for() -> None:
    sizes = ["--sequences", "5", "--shortest", "2", "--longest", "9", "--repeats", "1"]
    command = [sys.executable, "-m", "bench.workload", "--json", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert all(row[f"{side}_tokens_per_s"] > 0 for side in ("ours", "generate", "continuous"))
    wrong = subprocess.run([*command, "--shortest", "20"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "accepted is 1 <= shortest <= longest" in wrong.stderr


def test_the_judge_bench_counts_every_question(
    chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench import judge

    sizes = ["--groups", "1", "--tokens", "4", "--readings", "2", "--threshold", "0", "--dtype", "float32"]
    assert judge.main([str(chat_checkpoint), *sizes]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [(row["score"], row["readings"]) for row in rows]
    assert kinds == [("likeliest", 1), ("expected", 1), ("likeliest", 2), ("expected", 2)]
    for row in rows:
        assert (row["questions"], row["unscored"], row["agreed"]) == (16, 0, 1.0)
        assert row["asked"] <= 16  # a dialogue like another is not asked again
        assert (row["mean_std"] == 0) <= (row["flat_groups"] == 1)


@pytest.mark.parametrize("judge", ["policy", "words"])
def test_deliberation_is_measured_before_and_after(
    judge: str,
    chat_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a run of two steps; the scores and their intervals follow from the dialogues that it wrote."""
    monkeypatch.syspath_prepend(ROOT)
    from bench import collective

    sizes = {
        "dialogue.max_rounds": 1,
        "dialogue.max_tokens_per_turn": 4,
        "dialogue.max_tokens_final": 6,
        "grpo.group_size": 2,
        "grpo.groups_per_step": 1,
        "train.steps": 2,
        "train.threads": 1,
        "eval.dialogues": 5,
        **({"judge.threshold": 0} if judge == "policy" else {}),
    }
    run = tmp_path / "run"
    said = [f"{key}={value}" for key, value in sizes.items()]
    assert collective.main([str(chat_checkpoint), str(run), "--judge", judge, *said]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    summary = json.loads((run / "summary.json").read_text())
    for policy in ("warm_start", "trained"):
        assert row[f"{policy}_score"] == pytest.approx(summary[policy]["score"], abs=1e-3)
        assert row[f"{policy}_low"] <= row[f"{policy}_score"] <= row[f"{policy}_high"]
        assert row[f"{policy}_unscored"] == 0
        assert row[f"{policy}_rounds"] == summary[policy]["rounds"] == 1
    assert collective.main([str(chat_checkpoint), str(run), "--judge", judge, "--measured"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == row
    assert row["gain"] == pytest.approx(row["trained_score"] - row["warm_start_score"], abs=1e-3)


def test_the_judge_of_words_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench.collective import answer

    found = answer("<completion>We can decide together, and we both HELP; share &lt;us&gt;.</completion>")
    assert found == {"knowledge": 0, "benevolence": 2, "power": 2, "vitality": 4, "reason": "counted"}
    turns = '<turn speaker="1">Yes we do.</turn><turn speaker="2">Good.</turn>'
    assert answer(turns) == {"agreed": True, "assent": {"1": "Yes", "2": "Good."}}


def test_rows_with_new_columns_leave_the_older_ones_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.append_rows("made", [{"model": "a, b", "rate": 1.5}])
    first = (tmp_path / "made.csv").read_bytes()
    common.append_rows("made", [{"model": "c", "rate": 2.5}])
    assert (tmp_path / "made.csv").read_bytes().startswith(first)
    common.append_rows("made", [{"rate": 3.5, "share": 0.5}])
    with open(tmp_path / "made.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["rate"], row["share"]) for row in rows] == [
        ("a, b", "1.5", ""), ("c", "2.5", ""), ("", "3.5", "0.5"),
    ]  # fmt: skip
    assert list(rows[0]) == ["model", "rate", "share", "device", "commit", "date"]
    assert all(row["device"] and row["date"] for row in rows)


def test_every_row_of_the_results_has_the_columns_of_its_file() -> None:
    for path in (ROOT / "bench" / "results").glob("*.csv"):
        with open(path, newline="") as file:
            header, *rows = csv.reader(file)
        assert all(len(row) == len(header) for row in rows), path.name


def test_calls_on_a_gpu_are_queued_with_the_cache_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what the host asks for, with a stand-in for CUDA; nothing is waited for in between."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import common

    order: list[Any] = []
    times = iter((7.0, 3.0, 5.0))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, last: Event) -> float:
            return next(times)

    class Flushes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "zero_":
                order.append(("written", args[0].nbytes))
            return func(*args, **(kwargs or {}))

    gpu = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep") or cycles > 0 or 1 / 0)
    with Flushes():
        found = common.calls(lambda: order.append("call"), seconds=0, fewest=3, device="meta")
    assert found == [0.003, 0.005, 0.007]
    one = [("written", 100 << 20), "event", "call", "event"]
    assert order == ["call", "wait", "call", "wait", "sleep", *one * 3, "wait"]


@pytest.mark.parametrize(("game", "own"), [("price", "wrong_deals"), ("deal", "pareto")])
def test_a_finished_run_is_a_row_of_its_game(
    game: str, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what its summary says of a policy all that a game of its kind measures."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import common, demo

    settings = (SelectionSettings if game == "price" else DealSettings)(name=game, telling="english")
    kind: Any = kind_of(settings)(settings)
    measured = kind.summarise([]) | {"dialogues": 300.0, own: 0.25}
    summary = {"warm_start": measured, "trained": measured, "seed": 3, "steps": 104, "train_seconds": 60.4}
    (tmp_path / "summary.json").write_text(
        json.dumps(summary | {"peak_memory_bytes": 2**30, "parameters": 9})
    )
    config = {
        "game": {"name": game, "telling": "english"},
        "imitation": {"steps": 80},
        "train": {"threads": 2},
    }
    (tmp_path / "config.toml").write_text("".join(f"[{key}]\n{toml(value)}" for key, value in config.items()))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert demo.main([str(tmp_path)]) == 0
    with open(tmp_path / f"{game}-english.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row[f"warm_start_{own}"], row["selfplay_steps"], row["seed"]) == ("0.25", "24", "3")


def toml(values: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
