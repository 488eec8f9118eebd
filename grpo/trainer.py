"""Training, in one process on one set of weights: imitate, then negotiate with oneself and learn from the outcome.

A step of self-play reads

    groups = arena.play(scenarios)          # both sides are the policy
    rows = grpo_rows(groups)                # one packed row per dialogue and side
    update(rows)                            # in place: the engine has the new weights at once

Every random draw follows from (seed, stage, step), so a checkpoint needs no generator state, and a run that was killed goes on as
if it had not been.
"""

from __future__ import annotations

import json
import random
import resource
import threading
import time
from pathlib import Path
from typing import Any

import torch
from duologue.grpo import build, policy
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.config import Config
from duologue.grpo.console import Progress
from duologue.grpo.evaluate import evaluate
from duologue.grpo.loss import LossConfig
from duologue.grpo.opponents import Opponents
from duologue.grpo.optimizer import Optimizer, learning_rate
from duologue.grpo.rows import demonstration_batch, grpo_rows
from duologue.grpo.run_dir import Interrupted, RunDir
from duologue.grpo.update import (
    UpdateStats,
    accumulate_imitation_gradient,
    accumulate_policy_gradient,
    kl_to_reference,
)
from duologue.model.checkpoint import write_checkpoint
from duologue.model.decoder import Decoder
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.dialogue import Group, assign_rewards

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"


class Trainer:
    """Holds what a run is made of; `run()` trains to the end and returns the summary."""

    def __init__(self, config: Config, run: RunDir, progress: Progress, stop: threading.Event) -> None:
        policy.use_threads(config)
        self.config = config
        self.run_dir = run
        self.progress = progress
        self.stop = stop
        self.game = build.build_game(config)
        self.judge = build.build_judge(
            config, run.path / "judge.sqlite", lambda: (self._start_weights(), self.tokenizer)
        )
        self.corpus = build.build_corpus(config, self.game)
        self.baseline = RunningBaseline()
        self.step = 0  # steps done, both stages together
        self.seconds = 0.0  # of training, evaluation not counted
        self.warm_start: dict[str, float] | None = None
        checkpoint = run.latest_checkpoint()
        if checkpoint is None:
            self.model, self.tokenizer = policy.build_policy(config, self.corpus)
        else:
            self.model, self.tokenizer = policy.load_policy(checkpoint, config)
            policy.check_sizes(config, self.model, checkpoint)
        self.optimizer = self._new_optimizer()
        engine = build.build_engine(config, self.model)
        self.arena = build.build_arena(config, engine, self.tokenizer, self.game, self.judge)
        build.add_server(config, self.arena, run.path / "opponent.sqlite")
        self.reference: Decoder | None = None
        self.opponents = Opponents(config, run.path / "opponents", self.model, self.tokenizer, engine)
        if checkpoint is not None:
            self._restore(checkpoint)
        run.drop_lines_from(self.step)
        g = config.grpo
        self.loss = LossConfig(
            variant=g.loss,
            clip_low=g.clip_low,
            clip_high=g.clip_high,
            dual_clip=g.dual_clip,
            kl_coef=g.kl_coef,
            kl_estimator=g.kl_estimator,
            entropy_coef=g.entropy_coef,
            tis_cap=g.tis_cap,
        )

    def run(self) -> dict[str, Any]:
        imitation, selfplay = self.config.imitation.steps, self.config.train.steps
        if self.step < imitation:
            self.progress.stage("imitation", imitation, self.step)
            while self.step < imitation:
                self._timed(self._imitation_step)
                self._save_if_due(imitation)
        if self.warm_start is None:
            self._end_of_imitation()
        self.reference = self._load_reference()
        self.progress.stage("self-play", selfplay, self.step - imitation)
        while self.step < imitation + selfplay and not self._out_of_time():
            self._timed(self._selfplay_step)
            self._save_if_due(imitation + selfplay)
        return self._finish()

    # ---- the two kinds of step ---------------------------------------------------------------------------------------

    def _imitation_step(self) -> dict[str, Any]:
        c = self.config.imitation
        rows = demonstration_batch(self.corpus, self.tokenizer, c.dialogues_per_step, self._seed("imitation"))
        stats = accumulate_imitation_gradient(
            self.model,
            rows,
            max_tokens=self.config.train.tokens_per_microbatch,
            dropout_seed=self._seed("dropout"),
        )
        lr = learning_rate(
            self.step,
            peak=c.learning_rate,
            warmup_steps=c.warmup_steps,
            total_steps=c.steps,
            schedule="cosine",
        )
        norm = self.optimizer.step(lr)
        return {
            "stage": "imitation",
            "loss": stats.loss,
            "entropy": stats.entropy,
            "grad_norm": norm,
            "lr": lr,
            "tokens": stats.tokens,
        }

    def _selfplay_step(self) -> dict[str, Any]:
        c = self.config.grpo
        began = time.monotonic()
        groups, judge_stats = self._play()
        rows, row_stats = grpo_rows(groups, c, self.baseline)
        played = time.monotonic()
        metrics: dict[str, Any] = {
            "stage": "selfplay",
            **self._outcome_metrics(groups),
            **judge_stats,
            **row_stats,
        }
        metrics |= self.opponents.score(groups)
        if (
            self.reference is not None
            and self.config.train.kl_every
            and self._selfplay_index % self.config.train.kl_every == 0
        ):
            metrics["kl_start"] = kl_to_reference(
                self.reference,
                rows,
                temperature=self.config.dialogue.temperature,
                max_tokens=self.config.train.tokens_per_microbatch,
            )
        if self.config.rollout.release_memory or not self.config.rollout.cache_tokens:
            for engine in self.opponents.engines:
                engine.release_memory()
        update_began = time.monotonic()
        stats, norm, lr = self._update(rows)
        update_seconds = time.monotonic() - update_began
        self.opponents.keep(self._selfplay_index + 1)
        self.run_dir.append_dialogues(
            d.record(step=self.step, stage="selfplay") for group in groups for d in group.dialogues
        )
        sampled = sum(
            len(turn.logprobs or ()) for group in groups for d in group.dialogues for turn in d.turns
        )
        return metrics | {
            "loss": stats.loss,
            "entropy": stats.entropy,
            "clip_share": stats.clip_share,
            "mismatch": stats.mismatch,
            "grad_norm": norm,
            "lr": lr,
            "sampled_tokens": sampled,
            "rollout_tokens_per_s": sampled / (played - began),
            "update_tokens_per_s": stats.tokens / max(update_seconds, 1e-9),
        }

    def _play(self) -> tuple[list[Group], dict[str, float]]:
        rng = random.Random(self._seed("scenarios"))
        scenarios = [self.game.sample(rng, "train") for _ in range(self.config.grpo.groups_per_step)]
        opponents = self.opponents.of_groups(self._selfplay_index, self._seed("opponents"), self.reference)
        for engine in self.opponents.engines:
            engine.name_weights(self.step)  # the same in a resumed run
        groups = self.arena.play(
            scenarios,
            group_size=self.config.grpo.group_size,
            seed=self._seed("play"),
            opponents=opponents,
            step=self.step,
        )
        assign_rewards(self.game, [dialogue for group in groups for dialogue in group.dialogues])
        return groups, {} if self.judge is None else self.judge.costs()

    def _update(self, rows: list[Any]) -> tuple[UpdateStats, float, float]:
        """All updates of this step; the statistics are those of the first, the gradient norm and rate those of the last."""
        c, t, d = self.config.grpo, self.config.train, self.config.dialogue
        first: UpdateStats | None = None
        for epoch in range(c.updates_per_rollout):
            stats = accumulate_policy_gradient(
                self.model,
                rows,
                self.loss,
                temperature=self.config.dialogue.temperature,
                max_tokens=t.tokens_per_microbatch,
                reference=self.reference,
                after_part=self.optimizer.accumulate,
                budget=d.max_rounds * d.max_tokens_per_turn + d.max_tokens_final,
                dropout_seed=self._seed("dropout", epoch),
            )
            if c.imitation_coef:
                demonstrations = demonstration_batch(
                    self.corpus,
                    self.tokenizer,
                    self.config.imitation.dialogues_per_step,
                    self._seed("mixed", epoch),
                )
                accumulate_imitation_gradient(
                    self.model,
                    demonstrations,
                    max_tokens=t.tokens_per_microbatch,
                    coefficient=c.imitation_coef,
                    dropout_seed=self._seed("mixed dropout", epoch),
                )
            lr = learning_rate(
                self._selfplay_index,
                peak=c.learning_rate,
                warmup_steps=c.warmup_steps,
                total_steps=t.steps,
                schedule=c.schedule,
            )
            norm = self.optimizer.step(lr)
            first = first or stats
        assert first is not None
        return first, norm, lr

    def _outcome_metrics(self, groups: list[Group]) -> dict[str, float]:
        dialogues = [d for group in groups for d in group.dialogues]
        found = self.game.summarise([d.outcome for d in dialogues if d.outcome is not None])
        rewards = [sum(d.reward) / 2 for d in dialogues if d.reward is not None]
        return {**found, "reward": sum(rewards) / max(len(rewards), 1)}

    # ---- stages, time, state -----------------------------------------------------------------------------------------

    @property
    def _selfplay_index(self) -> int:
        return self.step - self.config.imitation.steps

    def _seed(self, *what: str | int) -> int:
        return derive_seed(self.config.train.seed, *what, self.step)

    def _timed(self, step: Any) -> None:
        """One step, its line in metrics.jsonl, and its time."""
        began = time.monotonic()
        metrics = step()
        seconds = time.monotonic() - began
        self.seconds += seconds
        if "tokens" in metrics:
            metrics["update_tokens_per_s"] = metrics.pop("tokens") / seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.run_dir.append_metrics(
            {"step": self.step, **metrics, "seconds": seconds, "peak_memory_bytes": peak}
        )
        self.step += 1
        in_stage = self.step if metrics["stage"] == "imitation" else self._selfplay_index
        self.progress.update(in_stage, metrics)

    def _out_of_time(self) -> bool:
        limit = self.config.train.max_seconds
        return bool(limit) and self.seconds >= limit

    def _end_of_imitation(self) -> None:
        """Keep the starting policy as `warm_start`, evaluate it, and begin self-play with a fresh optimizer."""
        self.run_dir.save_checkpoint(
            "warm_start", lambda folder: write_checkpoint(self.model, self.tokenizer, folder)
        )
        self.warm_start = self._evaluate("warm_start")
        self.optimizer = self._new_optimizer()
        self._save()

    def _evaluate(self, policy: str) -> dict[str, float]:
        self.progress.log(
            f"evaluating {policy.replace('_', ' ')} on {self.config.eval.dialogues} {self.config.eval.split} dialogues"
        )
        metrics, dialogues = evaluate(
            self.opponents.engine, self.tokenizer, self.game, self.config, self.judge
        )
        self.run_dir.append_dialogues(
            d.record(step=self.step, stage="eval", policy=policy) for d in dialogues
        )
        return metrics

    def _finish(self) -> dict[str, Any]:
        trained = self._evaluate("trained")
        summary = {
            "warm_start": self.warm_start,
            "trained": trained,
            "train_seconds": self.seconds,
            "seed": self.config.train.seed,
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": self.config.model.device,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        self._save()
        self.run_dir.write_summary(summary)
        return summary

    def _new_optimizer(self) -> Optimizer:
        g = self.config.grpo
        return Optimizer(
            self.model,
            betas=(g.betas[0], g.betas[1]),
            weight_decay=g.weight_decay,
            max_grad_norm=g.max_grad_norm,
        )

    def _load_reference(self) -> Decoder | None:
        if not (self.config.grpo.kl_coef or self.config.train.kl_every):
            return None
        return self._start_weights()

    def _start_weights(self) -> Decoder:
        return policy.load_beside(self.model, self.run_dir.path / "checkpoints" / "warm_start")

    def _save_if_due(self, last: int) -> None:
        if self.stop.is_set():
            self._save()
            raise Interrupted(f"stopped after step {self.step}; the state is saved")
        if self.step % self.config.train.save_every == 0 and self.step < last:
            self._save()

    def _save(self) -> None:
        self.run_dir.save_checkpoint(
            f"step_{self.step:06d}", self._write, keep=self.config.train.keep_checkpoints
        )
        self.opponents.forget_before(max(self._selfplay_index, 0))

    def _write(self, folder: Path) -> None:
        write_checkpoint(self.model, self.tokenizer, folder)
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "warm_start": self.warm_start,
            "baseline": self.baseline.state_dict(),
            "opponents": self.opponents.state_dict(),
        }
        (folder / STATE).write_text(json.dumps(state), "utf-8")

    def _restore(self, folder: Path) -> None:
        state = json.loads((folder / STATE).read_text("utf-8"))
        self.step, self.seconds, self.warm_start = state["step"], state["seconds"], state["warm_start"]
        self.baseline.load_state_dict(state["baseline"])
        self.opponents.load_state_dict(state["opponents"])
        self.optimizer.load_state_dict(
            torch.load(folder / OPTIMIZER, map_location=self.config.model.device, weights_only=True)
        )


def train(config: Config, run: RunDir, progress: Progress, stop: threading.Event) -> dict[str, Any]:
    """Train to the end of the configuration and return the summary; `Interrupted` after a save once `stop` is set."""
    trainer = Trainer(config, run, progress, stop)
    try:
        return trainer.run()
    finally:
        if trainer.judge is not None:
            trainer.judge.close()
        trainer.arena.speakers.close()
