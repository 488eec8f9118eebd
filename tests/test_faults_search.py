"""Any damage to any file of a run directory, and to a ledger: the same as without it, or one line and exit
code 1 or 2, with everything on disk as it was.

Hypothesis drops, doubles, cuts and retypes keys, lines and bytes. The cases are the same in every run;
FAULT_CASES says how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from duologue.grpo.cli import main
from duologue.grpo.trainer import Trainer
from duologue.rollout.judge.ledger import Ledger
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults_files import CASES, VALUES, damaged_bytes, damaged_json
from tiny import TINY

RUN = [
    *TINY,
    "imitation.steps=1",
    "imitation.dialogues=20",
    "grpo.groups_per_step=1",
    "opponent.kind=pool",
    "opponent.pool_every=1",
    "opponent.pool_size=2",
    "train.kl_every=1",
    "eval.dialogues=1",
]
LONGER = ["--resume", "train.steps=3"]
LAST = "checkpoints/step_000003"
SPOKEN = "hello\n/done\n/quit\n"


def search(share: float) -> Any:
    """Settings of a search of `share` of the cases."""
    return settings(
        max_examples=max(1, int(CASES * share)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a warm start, snapshots of opponents and checkpoints, and a ledger that nobody reads."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", "price", *RUN, "--run-dir", str(path)]) == 0
    assert {file.name for file in (path / "opponents").iterdir()} == {"step_000001", "step_000002"}
    return path


def copy(whole: Path, to: Path) -> Path:
    """A copy; what is replaced and never written into is shared."""
    shutil.rmtree(to, ignore_errors=True)

    def put(source: str, target: str) -> None:
        written = source.endswith((".jsonl", ".lock"))
        (shutil.copy if written else os.link)(source, target)

    shutil.copytree(whole, to, copy_function=put)
    return to


def contents(path: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != ".lock"}


# ---- what a command makes of a run -------------------------------------------------------------------------


def state(trainer: Trainer) -> list[Any]:
    """All that further steps follow from: weights, optimizer, counters, tokenizer, opponents."""
    tensors = {**dict(trainer.model.named_parameters()), **trainer.optimizer.state_dict()}
    tensors |= {f"start.{name}": value for name, value in trainer.start_weights().named_parameters()}
    met = trainer.opponents.of_groups(trainer.selfplay_index, 7)
    for engine in trainer.opponents.engines[1:]:
        tensors |= {f"other.{name}": value for name, value in engine.model.named_parameters()}
    hashed = {name: hashlib.sha256(v.detach().numpy().tobytes()).hexdigest() for name, v in tensors.items()}
    names = [opponent and (opponent.role, opponent.name) for opponent in met]
    counters = [trainer.step, trainer.seconds, trainer.warm_start, trainer.baseline.state_dict()]
    chat = trainer.tokenizer.chat
    ids = [trainer.tokenizer.encode("i take 2 books"), chat.open([1]), chat.reply(), *chat.stop_token_ids]
    return [hashed, names, counters, trainer.opponents.state_dict(), ids]


def resumed(run: Path, out: Path) -> tuple[int, Any]:
    found: list[Any] = []

    def look(trainer: Trainer) -> dict[str, Any]:
        found.extend(state(trainer))
        summary = {"warm_start": trainer.warm_start, "trained": {"dialogues": 0}, "train_seconds": 0.0}
        trainer.run_dir.write_summary(summary)
        return summary

    with mock.patch.object(Trainer, "run", look):
        code = main(["train", "price", *RUN, "--run-dir", str(run), *LONGER])
    return code, found


def reported(run: Path, out: Path) -> tuple[int, Any]:
    return main(["report", str(run)]), None


def evaluated(run: Path, out: Path) -> tuple[int, Any]:
    file = out / "measures.json"
    code = main(["eval", str(run / LAST), "--recipe", "price", *RUN, "--json", str(file)])
    if code:
        return code, None
    return code, {**json.loads(file.read_text()), "checkpoint": None}


def played(run: Path, out: Path) -> tuple[int, Any]:
    shown = io.StringIO()
    with mock.patch.object(sys, "stdin", io.StringIO(SPOKEN)), contextlib.redirect_stdout(shown):
        code = main(["play", str(run), "--temperature", "0"])
    return code, shown.getvalue()


def exported(run: Path, out: Path) -> tuple[int, Any]:
    folder = out / "exported"
    shutil.rmtree(folder, ignore_errors=True)
    code = main(["export", str(run), str(folder)])
    if code:
        return code, None
    return code, {file.name: file.read_bytes() for file in folder.iterdir()}


COMMANDS: dict[str, Callable[[Path, Path], tuple[int, Any]]] = {
    "resume": resumed,
    "report": reported,
    "eval": evaluated,
    "play": played,
    "export": exported,
}


@pytest.fixture(scope="module")
def expected(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By command, what it makes of the whole run."""
    out = tmp_path_factory.mktemp("expected")
    made = {name: command(copy(whole, out / "run"), out) for name, command in COMMANDS.items()}
    assert {code for code, _ in made.values()} == {0}
    return {name: found for name, (_, found) in made.items()}


# ---- damages -----------------------------------------------------------------------------------------------


def damaged_lines(data: bytes, draw: Any) -> bytes:
    """Of TOML and JSON lines: one line dropped, doubled, moved, with another value, or another's end."""
    lines = data.splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    other = draw(st.integers(0, len(lines) - 1))
    match draw(st.sampled_from(["drop", "double", "swap", "value", "value", "value", "splice"])):
        case "drop":
            del lines[at]
        case "double":
            lines.insert(other, lines[at])
        case "swap":
            lines[at], lines[other] = lines[other], lines[at]
        case "value" if lines[at].startswith(b"{"):
            lines[at] = damaged_json(lines[at], draw).replace(b"\n", b" ") + b"\n"
        case "value":
            value = json.dumps(draw(st.sampled_from(VALUES))).encode()
            lines[at] = lines[at].partition(b"=")[0] + b"= " + value + b"\n"
        case "splice":
            half = len(lines[at]) // 2
            lines[at] = lines[at][:half] + lines[other][-half:]
    return b"".join(lines)


def damage(file: Path, draw: Any) -> None:
    """Another file in the place of `file`, of which others hold the content."""
    data = file.read_bytes()
    how = draw(st.integers(0, 9))
    file.unlink()
    if how == 0:
        return
    if how == 1:
        file.mkdir()
        return
    if how < 6 and file.suffix in (".toml", ".jsonl"):
        file.write_bytes(damaged_lines(data, draw))
    elif how < 8 and file.suffix == ".json" and len(json.loads(data)):
        file.write_bytes(damaged_json(data, draw))
    elif data:
        file.write_bytes(damaged_bytes(data, draw))


def check(code: int, errors: str, before: dict[str, bytes], run: Path) -> None:
    assert code in (0, 1, 2)
    assert "Traceback" not in errors
    if code:
        assert errors.startswith("duologue: ")
        assert errors.count("\n") == 1
        assert contents(run) == before


KINDS = {  # files of a kind -> the commands that read them, share of the cases
    "config.toml": ("resume report play", 0.06),
    "sources.json": ("resume", 0.02),
    "metrics.jsonl": ("resume report", 0.06),
    "dialogues.jsonl": ("resume report", 0.06),
    "summary.json": ("resume report", 0.03),
    ".lock": ("resume", 0.01),
    f"{LAST}/trainer_state.json": ("resume report", 0.05),
    f"{LAST}/lines.json": ("resume", 0.03),
    f"{LAST}/checksums.json": ("resume eval play export", 0.03),
    f"{LAST}/optimizer.pt": ("resume", 0.03),
    f"{LAST}/*": ("resume eval play export", 0.1),
    "checkpoints/warm_start/*": ("resume", 0.04),
    "opponents/*/*": ("resume", 0.05),
}


@pytest.mark.parametrize("summed", [True, False], ids=["checksums", "older"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_run_is_the_same_or_is_refused_in_one_line(
    kind: str,
    summed: bool,
    whole: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without checksums what changes in a number is not known; with them it is."""
    commands, share = KINDS[kind]
    run = tmp_path / "run"

    @search(share if summed else share / 3)
    @given(st.data())
    def look(drawn: st.DataObject) -> None:
        copy(whole, run)
        if not summed:
            for file in run.rglob("checksums.json"):
                file.unlink()
        if not (files := sorted(run.glob(kind))):
            return
        command = drawn.draw(st.sampled_from(commands.split()))
        damage(drawn.draw(st.sampled_from(files)), drawn.draw)
        before = contents(run)
        capsys.readouterr()
        code, found = COMMANDS[command](run, tmp_path)
        check(code, capsys.readouterr().err, before, run)
        edited = kind.endswith("checksums.json") or (kind, command) == ("config.toml", "play")
        if code == 0 and summed and not edited:
            assert found == expected[command]

    look()


# ---- ledgers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A ledger of some pages, and what it holds."""
    path = tmp_path_factory.mktemp("ledger") / "judge.sqlite"
    held = {f"key {i}": json.dumps({"knowledge": i % 6, "reason": "x" * (i % 90)}) for i in range(150)}
    ledger = Ledger(path)
    for key, answer in held.items():
        ledger.put(key, "score", "judge", "1", answer)
    ledger.close()
    return path, held


def test_a_damaged_ledger_gives_its_answers_or_none_or_is_refused(
    answers: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    path, held = answers
    data = path.read_bytes()

    @search(0.15)
    @given(st.data())
    def look(drawn: st.DataObject) -> None:
        for name in ("judge.sqlite", "judge.sqlite-wal", "judge.sqlite-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        damaged = data
        for _ in range(drawn.draw(st.integers(1, 3))):
            damaged = damaged_bytes(damaged, drawn.draw) if damaged else damaged
        (tmp_path / "judge.sqlite").write_bytes(damaged)
        said = ""
        try:
            with contextlib.closing(Ledger(tmp_path / "judge.sqlite")) as ledger:
                assert all(ledger.get(key) in (answer, None) for key, answer in held.items())
                ledger.put("key 0", "score", "judge", "1", "{}")
                assert ledger.get("key 0") == "{}"
        except (ValueError, OSError) as error:
            said = str(error)
        assert not said or ("judge.sqlite" in said and "\n" not in said)

    look()
