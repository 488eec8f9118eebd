"""What a step teaches: steps and dialogues to a given skill with and without `grpo.resample` and
`grpo.credit = "turn"`, and with groups whose sides are swapped, in the game of bench/words.py; for the last
also the variance of the gradient at a fixed policy.

    taskset -c 1 python -m bench.teach    # some minutes; a table, a JSON line last
    python -m bench.teach --seeds 1 --save
    python -m bench.teach --deal runs/demo/checkpoints/warm_start    # resample in `deal`, from a warm start
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.config import load_config
from duologue.grpo.console import Progress
from duologue.grpo.rows import grpo_rows
from duologue.grpo.run_dir import RunDir
from duologue.grpo.trainer import Trainer
from duologue.grpo.update import accumulate_policy_gradient
from duologue.rollout.games.game import Scenario
from duologue.rollout.games.text_game import TextGame
from duologue.rollout.selfplay.dialogue import POLICY, Group

from bench.common import append_rows
from bench.models import TINY

SETTINGS = [
    f"game.name={Path(__file__).parent / 'words.py'}",
    *TINY,
    "model.vocab_size=300",
    "model.max_position=256",
    "rollout.cache_tokens=16384",
    "dialogue.max_tokens_per_turn=4",
    "grpo.learning_rate=3e-3",
    "grpo.warmup_steps=0",
    "grpo.schedule=constant",
    "grpo.advantage=leave_one_out",
    "train.steps=1000",
    "train.kl_every=0",
    "watch.enabled=false",
]
LOOK_BACK = 3  # steps of the mean skill that must reach the goal
Settings = tuple[str, ...]
LONG = ("game.options.turns=8",)
LUCKY = ("opponent.kind=start", "game.options.luck=1")
HALVES = ("grpo.group_size=4", "grpo.groups_per_step=16")  # in place of 8 groups of 8
QUESTIONS: dict[str, tuple[float, Settings, dict[str, Settings]]] = {
    # the goal, what all runs have, and what is compared
    "resample": (
        0.5,
        ("game.options.whole=true", "game.options.turns=4", "grpo.group_size=4", "grpo.groups_per_step=6"),
        {"0": (), "3": ("grpo.resample=3",)},
    ),
    "credit": (
        0.8,
        (*LONG, "grpo.group_size=4", "grpo.groups_per_step=2"),
        {"dialogue": (), "turn": ("grpo.credit=turn",)},
    ),
    "mirror": (
        0.8,
        (*LUCKY, "grpo.groups_per_step=8"),
        {"groups of 8": (), "groups of 4": HALVES, "pairs of 4": HALVES},
    ),
}
MOST_STEPS = 120
PRACTICE = 12  # steps of the policy whose gradient is looked at
DRAWS = 32  # of its gradient


class Run(Trainer):
    """A run from nothing; with `paired` every second group is the one before it with the sides swapped."""

    def __init__(self, settings: Sequence[str], seed: int, folder: str, paired: bool = False) -> None:
        config = load_config("text-game", [*SETTINGS, f"train.seed={seed}", *settings])
        path = RunDir.create(Path(folder) / "run", config.to_toml())
        super().__init__(config, path, Progress(quiet=True), threading.Event())
        self.reference = copy.deepcopy(self.model)
        if paired:
            self.game.sample = partial(self._paired, self.game.sample, [])  # type: ignore[method-assign]

    def _paired(self, sample: Any, swapped: list[Scenario], rng: random.Random, split: str) -> Scenario:
        assert isinstance(self.game, TextGame)
        if swapped:
            return swapped.pop()
        scenario: Scenario = sample(rng, split)
        swapped.append(self.game.scenario(scenario.data ^ 1, split))
        return scenario

    def skill(self) -> float:
        """Of the policy in the dialogues of a step as they were drawn: its score without its luck."""
        luck = self.config.game.options.get("luck", 0)
        drawn = [dialogue for group in self.played for dialogue in group.drawn.dialogues]
        return statistics.fmean(
            d.outcome.scores[side] - luck * int(d.scenario.private_text[side].split()[-1])
            for d in drawn
            for side in (0, 1)
            if d.outcome and d.players[side] == POLICY
        )


def until(goal: float, run: Trainer, skill: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """Self-play until the mean skill of the last steps is at the goal; `skill` has the step's metrics."""
    skills: list[float] = []
    dialogues = 0.0
    while len(skills) < MOST_STEPS and statistics.fmean(skills[-LOOK_BACK:] or [-1.0]) < goal:
        metrics = run.selfplay_step()
        run.step += 1
        skills.append(skill(metrics))
        dialogues += metrics["dialogues"] + metrics.get("resampled_dialogues", 0)
    run.run_dir.close()
    found = {"steps": len(skills), "dialogues": int(dialogues)}
    return {**found, "skill": round(statistics.fmean(skills[-LOOK_BACK:]), 3)}


def steps_to(goal: float, settings: Sequence[str], seed: int, paired: bool) -> dict[str, Any]:
    """In the game of words, from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(settings, seed, folder, paired)
        return until(goal, run, lambda metrics: run.skill())


# ---- deal --------------------------------------------------------------------------------------------------

DEAL_GOAL = 0.85  # of a step's dialogues, as they were drawn, are agreed and Pareto-optimal
DEAL = [
    "imitation.steps=0",
    "game.telling=plain",
    "opponent.kind=self",
    "train.kl_every=0",
    "watch.enabled=false",
]


def steps_in_deal(start: Path, resample: int, seed: int) -> dict[str, Any]:
    """Self-play of the recipe `deal` from a warm start until the goal holds over the last steps."""
    config = load_config(
        "deal", [*DEAL, f"model.path={start}", f"train.seed={seed}", f"grpo.resample={resample}"]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = RunDir.create(Path(folder) / "run", config.to_toml())
        run = Trainer(config, path, Progress(quiet=True), threading.Event())
        return until(DEAL_GOAL, run, lambda metrics: metrics["agreement"] * metrics["pareto"])


# ---- the gradient at a fixed policy ------------------------------------------------------------------------


def apart(groups: list[Group]) -> list[Group]:
    return groups


def together(groups: list[Group]) -> list[Group]:
    """A group and its mirrored one are compared as one, whatever the side."""
    return [
        Group(scenario=a.scenario, dialogues=a.dialogues + b.dialogues)
        for a, b in zip(groups[::2], groups[1::2], strict=True)
    ]


def turned(groups: list[Group]) -> list[Group]:
    """A group and its mirrored one as one, in which a side is who was dealt the same."""
    for group in groups[1::2]:
        for dialogue in group.dialogues:
            assert dialogue.reward is not None
            dialogue.views, dialogue.reward = dialogue.views[::-1], dialogue.reward[::-1]
    return together(groups)


CREDIT = (*LONG, "grpo.group_size=4", "grpo.groups_per_step=8")
GRADIENTS: dict[str, tuple[Settings, bool, Callable[[list[Group]], list[Group]]]] = {
    "start: groups of 8": ((*LUCKY, "grpo.groups_per_step=8"), False, apart),
    "start: groups of 4": ((*LUCKY, *HALVES), False, apart),
    "start: pairs of 4, each side by itself": ((*LUCKY, *HALVES), True, apart),
    "start: pairs of 4, one baseline": ((*LUCKY, *HALVES), True, together),
    "self: groups of 8": ((LUCKY[1], "grpo.groups_per_step=8"), False, apart),
    "self: pairs of 4, by what was dealt": ((LUCKY[1], *HALVES), True, turned),
    "credit: dialogue": (CREDIT, False, apart),
    "credit: turn": ((*CREDIT, "grpo.credit=turn"), False, apart),
}

PRACTISED = {name: GRADIENTS[f"{name}: groups of 8"][0] for name in ("start", "self")} | {"credit": CREDIT}


def practised(settings: Settings, seed: int) -> dict[str, Tensor]:
    """The weights of a policy after a few steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(settings, seed, folder)
        for _ in range(PRACTICE):
            run.selfplay_step()
            run.step += 1
        run.run_dir.close()
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def gradient_variance(
    weights: dict[str, Tensor], seed: int, settings: Settings, paired: bool, merge: Callable[..., list[Group]]
) -> dict[str, Any]:
    """The sum over parameters of the variance of a step's gradient, and the standard error of that."""
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(settings, seed, folder, paired)
        run.model.load_state_dict(weights)
        config = run.config
        for step in range(DRAWS):
            run.step = 1000 + step
            rows, _ = grpo_rows(merge(run.play()), config.grpo, RunningBaseline())
            run.model.zero_grad()
            accumulate_policy_gradient(
                run.model, rows, config.grpo.loss_config, temperature=1.0, max_tokens=16_384
            )
            gradients = [p.grad.flatten() for p in run.model.parameters() if p.grad is not None]
            drawn.append(torch.cat(gradients).double())
        run.run_dir.close()
    every = torch.stack(drawn)
    squares = (every - every.mean(0)).square().sum(1) * DRAWS / (DRAWS - 1)
    return {"variance": float(squares.mean()), "standard_error": float(squares.std() / DRAWS**0.5)}


# ---- the table ---------------------------------------------------------------------------------------------


def in_deal(start: Path, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for seed in range(seeds):
        for n in (0, 2):
            found = steps_in_deal(start, n, seed)
            rows.append({**EMPTY, "question": "resample in deal", "kind": str(n), "seed": seed, **found})
            print(*rows[-1].values(), flush=True)
    return rows


def in_words(seeds: int) -> list[dict[str, Any]]:
    rows = []
    weights = {name: practised(settings, 0) for name, settings in PRACTISED.items()}
    for kind, variant in GRADIENTS.items():
        found = gradient_variance(weights[kind.partition(":")[0]], 0, *variant)
        rows.append({**EMPTY, "question": "gradient", "kind": kind, "seed": 0, **found})
        print(*rows[-1].values(), flush=True)
    for seed in range(seeds):
        for question, (goal, shared, kinds) in QUESTIONS.items():
            for kind, more in kinds.items():
                found = steps_to(goal, [*shared, *more], seed, kind.startswith("pairs"))
                rows.append({**EMPTY, "question": question, "kind": kind, "seed": seed, **found})
                print(*rows[-1].values(), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="append the rows to results/teach.csv")
    parser.add_argument("--deal", type=Path, metavar="DIR", help="the game of `deal`, from this checkpoint")
    options = parser.parse_args()
    began = time.process_time()
    rows = in_deal(options.deal, options.seeds) if options.deal else in_words(options.seeds)
    if options.save:
        append_rows("teach", rows)
    show(rows)
    print(json.dumps({"seconds": round(time.process_time() - began), "rows": rows}))
    return 0


EMPTY = dict.fromkeys(
    ("question", "kind", "seed", "steps", "dialogues", "skill", "variance", "standard_error"), ""
)


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Means over the seeds", title_justify="left")
    for heading in ("question", "kind", "steps", "dialogues", "variance of the gradient"):
        table.add_column(heading)
    for question, kind in dict.fromkeys((row["question"], row["kind"]) for row in rows):
        of_kind = [row for row in rows if (row["question"], row["kind"]) == (question, kind)]
        if question == "gradient":
            (row,) = of_kind
            table.add_row(question, kind, "", "", f"{row['variance']:.3g} +- {row['standard_error']:.1g}")
        else:
            means = (
                f"{statistics.fmean(row[name] for row in of_kind):.1f}" for name in ("steps", "dialogues")
            )
            table.add_row(question, kind, *means, "")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
