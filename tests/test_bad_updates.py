"""An update that is not finite is skipped and named; the weights and the optimizer stay as they were."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo import steps
from duologue.grpo.config import load_config
from duologue.grpo.console import Progress
from duologue.grpo.packing import Row
from duologue.grpo.run_dir import Interrupted, RunDir, read_lines
from duologue.grpo.trainer import Trainer
from duologue.grpo.update import UpdateStats, accumulate_policy_gradient
from tiny import LETTERS

SETTINGS = [
    *LETTERS,
    "train.steps=4",
    "train.save_every=1",
    "train.kl_every=0",
    "grpo.group_size=4",
    "grpo.groups_per_step=2",
    "grpo.advantage=running",
    "dialogue.max_tokens_per_turn=10",
    "eval.dialogues=2",
    "eval.partners=[]",
]
Poison = Callable[[Row], Row]


class Said(Progress):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def log(self, message: str) -> None:
        self.said.append(message)


def trainer(path: Path, *more: str, stop: threading.Event | None = None) -> Trainer:
    config = load_config("text-game", [*SETTINGS, *more])
    made = path / "config.toml"
    run = RunDir.resume(path, config.to_toml()) if made.is_file() else RunDir.create(path, config.to_toml())
    return Trainer(config, run, Said(), stop or threading.Event())


def poisoned(monkeypatch: pytest.MonkeyPatch, at: Sequence[int], poison: Poison) -> None:
    """Updates by number, from 0, of which dialogue 5 is not as it was."""
    updates = [0]

    def accumulate(model: Any, *, rows: Sequence[Row], **how: Any) -> UpdateStats:
        whole = "after_part" in how  # otherwise it is a look at one row
        bad = (updates[0] if whole else updates[0] - 1) in at
        updates[0] += whole
        rows = [poison(row) if bad and row.dialogue_id == 5 else row for row in rows]
        return accumulate_policy_gradient(model, rows, **how)

    monkeypatch.setattr(steps, "accumulate_policy_gradient", accumulate)


def without_number(row: Row) -> Row:
    return dataclasses.replace(row, advantage=math.nan)


def too_steep(row: Row) -> Row:
    """Its loss is a number; the sum over tokens of the gradient is not."""
    return dataclasses.replace(row, advantage=3e38)


def state(of: Trainer) -> dict[str, torch.Tensor]:
    tensors = {**dict(of.model.named_parameters()), **of.optimizer.state_dict()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("poison", [without_number, too_steep])
def test_an_update_that_is_not_finite_is_skipped_and_its_dialogue_named(
    poison: Poison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, [0], poison)
    run = trainer(tmp_path / "run")
    before = state(run)
    run._timed(run.selfplay_step)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(run).items())
    (line,) = [line for line in run.progress.said if "skipped" in line]
    assert line.startswith("step 0: ")
    assert line.endswith(", by dialogues 5: the update is skipped")
    assert all(parameter.grad is None for parameter in run.model.parameters())
    run._timed(run.selfplay_step)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in state(run).items())
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["bad_updates"] == 1
    assert "bad_updates" not in rows[1]
    assert len(read_lines(tmp_path / "run" / "dialogues.jsonl")) == 2 * 8  # also those that are named


def test_too_many_in_a_row_end_the_run_also_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, [0, 2, 3], without_number)
    limit, stop = "train.max_bad_updates=2", threading.Event()
    first = trainer(tmp_path / "run", limit, stop=stop)
    save_if_due = first._save_if_due

    def stopping(last: int) -> None:
        if first.step == 3:
            stop.set()
        save_if_due(last)

    monkeypatch.setattr(first, "_save_if_due", stopping)
    with pytest.raises(Interrupted):
        first.run()
    assert first.bad.in_a_row == 1  # the first was followed by one that was taken
    first.run_dir.close()
    second = trainer(tmp_path / "run", limit)
    with pytest.raises(RuntimeError, match=r"step 3: .*dialogues 5.*2 in a row.*train.max_bad_updates = 2"):
        second.run()
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("bad_updates", 0) for row in rows] == [1, 0, 1, 1]
    assert rows[3]["loss"] is None
