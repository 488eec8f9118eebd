"""Training that watches itself: small evaluations, the best policy, signs of a collapse, the way back.

Nothing here draws, so a run is the same with and without it, until a rule stops it or goes back.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.best import BEST, Best, measured
from duologue.grpo.checkpoints import read_state, step_of
from duologue.grpo.collapse import Watch
from duologue.grpo.config import Config
from duologue.grpo.crossplay import Player
from duologue.grpo.partners import START, policy_player
from duologue.grpo.policy import restore_weights
from duologue.grpo.run_dir import RunDir, iter_lines
from duologue.grpo.space import weight_bytes
from duologue.grpo.steps import Metrics, Steps
from duologue.grpo.talk_stats import talk_stats
from duologue.grpo.world import World
from duologue.model.checkpoint import write_checkpoint
from duologue.model.files import altered
from duologue.rollout.selfplay.dialogue import POLICY

GOOD = "good_"  # begins the name of a checkpoint that a rollback can go to; its number is that of the step


class Watched(Steps):
    """The steps, with `best` and `watch`."""

    def __init__(self, config: Config, run: RunDir, world: World) -> None:
        super().__init__(config, run, world)
        self.seconds = 0.0  # of training, evaluation not counted
        self.best = Best(config.train.best_by)
        self.watch = Watch(config.watch, config.grpo.advantage)
        self._weights: list[int] = []  # a sum of each parameter's bits, before the step

    @property
    def stopped(self) -> str:
        """Why self-play ends before its last step; "" while it does not."""
        patience = self.config.train.patience
        if patience and self.best.waited >= patience:
            return (
                f"no better evaluation than that after step {self.best.step} in {self.best.waited} in a row"
            )
        do, why = self.watch.action
        return why if do == "stop" else ""

    # ---- evaluations ---------------------------------------------------------------------------------------

    def measure(self) -> Metrics:
        """The small evaluation of the policy as it is, where one is due, and what share of the run's time all
        of them took.
        """
        c = self.config
        if not c.eval.every or self.selfplay_index % c.eval.every:
            return {}
        began = time.monotonic()
        policy, start = Player(name=POLICY, engine=self.opponents.engine, tokenizer=self.tokenizer), None
        if not self.game.alone:
            start = policy_player(START, self.reference or self.start_weights(), self.tokenizer, c)
        measures = measured(policy, start, self.game, c, self.judge, self.world)
        if self.judge is not None:
            self.judge.costs()  # are those of steps
        self.best.note(self.step, measures)
        seconds = time.monotonic() - began
        self.best.seconds += seconds
        share = self.best.seconds / (self.best.seconds + self.seconds)
        if self.selfplay_index == 0:
            self.keep_best()
        return {"eval": measures, "eval_seconds": seconds, "eval_share": share}

    def keep_best(self) -> None:
        """Write the policy as it is as the best one where the last evaluation says so, or a kill came between
        that and the checkpoint.
        """
        written = self.best.written(self.run_dir.path / "checkpoints" / BEST)
        if self.world.agree(self.world.is_first and self.best.step == self.step and not written):  # world
            self.run_dir.save_checkpoint(BEST, self._write_best, needed=weight_bytes(self.model))

    def _write_best(self, folder: Path) -> None:
        write_checkpoint(self.model, self.tokenizer, folder)
        self.best.write_note(folder)

    # ---- signs of a collapse -------------------------------------------------------------------------------

    def remember(self) -> None:
        """What the lines of earlier processes say, before the first step of this one."""
        for row in iter_lines(self.run_dir.path / "metrics.jsonl"):
            self.watch.feed(row)
        self.rate_scale = self.watch.rate_scale
        last = self.watch.rollbacks[-1] if self.watch.rollbacks else None
        if last is not None and last["step"] == self.step:
            self.forget_since(last["to"])
        self._weights = self._fingerprint()

    def look(self) -> Metrics:
        """What the step's dialogues and its update look like."""
        if not self.config.watch.enabled:
            return {}
        before, self._weights = self._weights, self._fingerprint()
        drawn = [group.drawn for group in self.played]
        stats = talk_stats(drawn, self.tokenizer.stop_token_ids, self.world)
        return {"watch": {**stats, "changed": before != self._weights}}

    def note(self, row: Metrics) -> list[str]:
        """A step's line, before it is written: what holds now, and where to go back to, are put into it. What
        a user should hear is returned. `step` is that after it.
        """
        self.watch.feed({"stage": "selfplay", **row})
        do, why = self.watch.action
        if self.watch.alarms:
            row["watch"]["alarms"] = self.watch.alarms
        said = [f"warning: after step {self.step} {self.watch.alarms[name]}" for name in self.watch.new]
        if do == "rollback":
            to = self._target()
            row["watch"]["rollback"] = {"step": self.step, "to": to.name, "why": why}
            said.append(f"going back to {to.name} after step {self.step}: {why}")
        return said

    def _fingerprint(self) -> list[int]:
        kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        if not self.config.watch.enabled:
            return []
        bits = (p.detach().view(kinds[p.element_size()]) for p in self.model.parameters() if p.requires_grad)
        return torch.stack([part.sum(dtype=torch.int64) for part in bits]).tolist()

    # ---- the way back --------------------------------------------------------------------------------------

    def good(self) -> list[Path]:
        """The checkpoints that a rollback can go to, the oldest first."""
        return sorted((self.run_dir.path / "checkpoints").glob(f"{GOOD}[0-9]*"), key=step_of)

    def keep_good(self, save: Callable[[str], Any]) -> None:
        """Keep the policy by `save(name)` where a rollback may want it, and the two latest such."""
        c = self.config
        due = self.step % c.train.save_every == 0 and self.selfplay_index > 0 and self.watch.steps > 0
        if not c.watch.rollback or self.watch.alarms or not due:
            return
        name = f"{GOOD}{self.step:06d}"
        written = self.run_dir.path / "checkpoints" / name
        if self.world.agree(self.world.is_first and not written.exists()):  # world
            save(name)
        self._drop([path for path in self.good() if step_of(path) <= self.step][:-2])

    def go_back(self, rollback: Metrics) -> None:
        """To the weights, moments and baseline that `rollback` names; the step stays."""
        folder = self.run_dir.path / "checkpoints" / rollback["to"]
        if reason := altered(folder):
            raise ValueError(f"{folder}, to which a rollback goes, is damaged ({reason})")
        restore_weights(self.model, folder)
        self.optimizer.reset()
        self.baseline.means = {}
        if folder.name.startswith(GOOD):
            state, moments = read_state(folder)
            self.baseline.load_state_dict(state["baseline"])
            self.optimizer.load_state_dict(moments)
        self.watch.went_back(rollback)
        self.best.waited = 0
        self.rate_scale = self.watch.rate_scale
        self._weights = self._fingerprint()

    def _target(self) -> Path:
        """The older of the latest two that are good: a collapse may have begun before a rule saw it."""
        good = [path for path in self.good() if step_of(path) <= self.step][-2:]
        return good[0] if good else self.run_dir.path / "checkpoints" / "warm_start"

    def forget_since(self, to: str) -> None:
        """After the checkpoint that says so was written: what was kept since `to` is of a policy gone bad."""
        step = int(to.removeprefix(GOOD)) if to.startswith(GOOD) else self.config.imitation.steps
        self._drop([path for path in self.good() if step_of(path) > step])
        self.opponents.go_back(step - self.config.imitation.steps)

    def _drop(self, folders: list[Path]) -> None:
        for folder in folders if self.world.is_first else ():
            shutil.rmtree(folder)
        self.world.agree(False)  # world: nobody looks for them before they are gone
