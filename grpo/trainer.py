"""Training, on one set of weights: imitate, then negotiate with oneself and learn from the outcome.

A step of self-play, `Trainer.selfplay_step`, reads

    groups = self.play()                      # both sides are the policy, or one is an opponent
    rows, of_rows = grpo_rows(groups, ...)    # one packed row per dialogue and side, with its advantage
    of_update = self.update(rows)             # in place: the engine has the new weights at once

Every random draw follows from (seed, stage, step), so a checkpoint needs no generator state, and a run that
was killed goes on as if it had not been. What is marked `# world` is where the processes of a run meet
(grpo/world.py).
"""

from __future__ import annotations

import functools
import random
import resource
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from duologue.grpo import build, policy
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.config import Config
from duologue.grpo.console import Progress
from duologue.grpo.evaluate import evaluate
from duologue.grpo.opponents import Opponents
from duologue.grpo.optimizer import Optimizer, learning_rate
from duologue.grpo.packing import Row
from duologue.grpo.rows import demonstration_batch, grpo_rows
from duologue.grpo.run_dir import Interrupted, RunDir, read_state, step_name, write_state
from duologue.grpo.update import (
    UpdateStats,
    accumulate_imitation_gradient,
    accumulate_policy_gradient,
    kl_to_reference,
)
from duologue.grpo.world import ALONE, World
from duologue.model.checkpoint import write_checkpoint
from duologue.model.decoder import Decoder
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.dialogue import Dialogue, Group, assign_rewards

Metrics = dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])


def clocked(method: Method) -> Method:
    """A trainer's method whose seconds go into its `clock`, by the method's name."""

    @functools.wraps(method)
    def timed(self: Trainer, *arguments: Any) -> Any:
        began = time.monotonic()
        result = method(self, *arguments)
        self.clock[method.__name__] = time.monotonic() - began
        return result

    return cast(Method, timed)


class Trainer:
    """Holds what a run is made of; `run()` trains to the end and returns the summary."""

    def __init__(
        self, config: Config, run: RunDir, progress: Progress, stop: threading.Event, world: World = ALONE
    ) -> None:
        policy.use_threads(config)
        self.config = config
        self.run_dir = run
        self.progress = progress
        self.stop = stop
        self.world = world
        self.game = build.build_game(config)
        self.judge = build.build_judge(
            config, run.path / "judge.sqlite", lambda: (self._start_weights(), self.tokenizer)
        )
        self.corpus = build.build_corpus(config, self.game)
        self.baseline = RunningBaseline()
        self.step = 0  # steps done, both stages together
        self.seconds = 0.0  # of training, evaluation not counted
        self.clock: dict[str, float] = {}  # of the parts of this step
        self.scores: Metrics = {}  # of this step: what the judge cost, how the policy fared against opponents
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
        self.opponents = Opponents(config, run.path / "opponents", self.model, self.tokenizer, engine, world)
        if checkpoint is not None:
            self._restore(checkpoint)
        run.drop_lines_from(self.step)

    def run(self) -> dict[str, Any]:
        imitation, selfplay = self.config.imitation.steps, self.config.train.steps
        if self.step < imitation:
            self.progress.stage("imitation", imitation, self.step)
            while self.step < imitation:
                self._timed(self.imitation_step)
                self._save_if_due(imitation)
        if self.warm_start is None:
            self._end_of_imitation()
        self.reference = self._load_reference()
        self.progress.stage("self-play", selfplay, self.step - imitation)
        while self.step < imitation + selfplay and not self._out_of_time():
            self._timed(self.selfplay_step)
            self._save_if_due(imitation + selfplay)
        return self._finish()

    # ---- a step of self-play -------------------------------------------------------------------------------

    def selfplay_step(self) -> Metrics:
        groups = self.play()
        rows, of_rows = grpo_rows(groups, self.config.grpo, self.baseline, self.world)
        of_update = self.update(rows)
        self.opponents.keep(self.selfplay_index + 1)
        self._record(groups)
        return {**self.outcomes(groups), **of_rows, **of_update}

    @clocked
    def play(self) -> list[Group]:
        """This rank's groups of the step, with their rewards. Both sides are the policy, or one is an
        opponent.
        """
        c = self.config.grpo
        rng = random.Random(self._seed("scenarios"))
        scenarios = [self.game.sample(rng, "train") for _ in range(c.groups_per_step)]
        opponents = self.opponents.of_groups(self.selfplay_index, self._seed("opponents"), self.reference)
        for engine in self.opponents.engines:
            engine.name_weights(self.step)  # the same in a resumed run
        groups = self.arena.play(
            self.world.share(scenarios),  # world
            group_size=c.group_size,
            seed=self._seed("play"),
            opponents=self.world.share(opponents),  # world
            step=self.step,
            first_group=self.world.share(range(c.groups_per_step))[0],  # world
        )
        assign_rewards(self.game, [dialogue for group in groups for dialogue in group.dialogues])
        costs = {} if self.judge is None else self.judge.costs()
        self.scores = {**costs, **self.opponents.score(groups)}
        return groups

    def outcomes(self, groups: Sequence[Group]) -> Metrics:
        """What came of the dialogues of all ranks, by the game's measures, and what the judge and opponents
        say.
        """
        ended = [[(d.outcome, d.reward, _sampled(d)) for d in group.dialogues] for group in groups]
        of_all = [dialogue for group in self.world.gather(ended) for dialogue in group]  # world
        rewards = [sum(reward) / 2 for _, reward, _ in of_all if reward is not None]
        return {
            "stage": "selfplay",
            **self.game.summarise([outcome for outcome, _, _ in of_all if outcome is not None]),
            "reward": sum(rewards) / max(len(rewards), 1),
            **self.scores,
            "sampled_tokens": sum(sampled for _, _, sampled in of_all),
        }

    def update(self, rows: Sequence[Row]) -> Metrics:
        """All updates of this step, in place, and how far the policy is from where it started."""
        metrics: Metrics = {}
        t, temperature = self.config.train, self.config.dialogue.temperature
        if self.reference is not None and t.kl_every and self.selfplay_index % t.kl_every == 0:
            metrics["kl_start"] = kl_to_reference(
                self.reference,
                rows,
                temperature=temperature,
                max_tokens=t.tokens_per_microbatch,
                world=self.world,
            )
        if self.config.rollout.released:
            for engine in self.opponents.engines:
                engine.release_memory()
        return metrics | self.optimise(rows)

    @clocked
    def optimise(self, rows: Sequence[Row]) -> Metrics:
        """Of several updates on one rollout the statistics are the first's, but the gradient norm, the rate
        and `kl_old`, how far the policy had moved from the one that sampled, are the last's.
        """
        c = self.config.grpo
        at, total = self.selfplay_index, self.config.train.steps
        lr = learning_rate(
            at, peak=c.learning_rate, warmup_steps=c.warmup_steps, total_steps=total, schedule=c.schedule
        )
        every = []
        for epoch in range(c.updates_per_rollout):
            every.append(self._policy_gradient(rows, epoch))
            if c.imitation_coef:
                self._imitation_gradient(
                    self._seed("mixed", epoch), c.imitation_coef, self._seed("mixed dropout", epoch)
                )
            norm = self._optimizer_step(lr)
        metrics = every[0].metrics() | {"kl_old": every[-1].metrics()["kl_old"], "grad_norm": norm, "lr": lr}
        del metrics["trained_tokens"]
        return metrics

    def _policy_gradient(self, rows: Sequence[Row], epoch: int) -> UpdateStats:
        d = self.config.dialogue
        return accumulate_policy_gradient(
            self.model,
            rows,
            self.config.grpo.loss_config,
            temperature=d.temperature,
            max_tokens=self.config.train.tokens_per_microbatch,
            reference=self.reference,
            after_part=self.optimizer.accumulate,
            budget=d.max_rounds * d.max_tokens_per_turn + d.max_tokens_final,
            dropout_seed=self._seed("dropout", epoch),
            world=self.world,
        )

    def _optimizer_step(self, lr: float) -> float:
        """The gradient norm."""
        (squared,) = self.world.sum([float(self.optimizer.squared_grad_norm())])  # world
        return self.optimizer.step(lr, squared)

    # ---- a step of imitation -------------------------------------------------------------------------------

    def imitation_step(self) -> Metrics:
        c = self.config.imitation
        stats = self._imitation_gradient(self._seed("imitation"), 1.0, self._seed("dropout"))
        lr = learning_rate(
            self.step,
            peak=c.learning_rate,
            warmup_steps=c.warmup_steps,
            total_steps=c.steps,
            schedule="cosine",
        )
        metrics = stats.metrics()
        return {
            "stage": "imitation",
            **{key: metrics[key] for key in ("loss", "entropy", "tokens")},
            "grad_norm": self._optimizer_step(lr),
            "lr": lr,
        }

    def _imitation_gradient(self, seed: int, coefficient: float, dropout_seed: int) -> UpdateStats:
        demonstrations = demonstration_batch(
            self.corpus, self.tokenizer, self.config.imitation.dialogues_per_step, seed
        )
        return accumulate_imitation_gradient(
            self.model,
            self.world.share(demonstrations),  # world
            max_tokens=self.config.train.tokens_per_microbatch,
            coefficient=coefficient,
            dropout_seed=dropout_seed,
            world=self.world,
        )

    # ---- stages, time, state -------------------------------------------------------------------------------

    @property
    def selfplay_index(self) -> int:
        """Steps of self-play done."""
        return self.step - self.config.imitation.steps

    def _seed(self, *what: str | int) -> int:
        return derive_seed(self.config.train.seed, *what, self.step)

    def _timed(self, step: Callable[[], Metrics]) -> None:
        """One step, its line in metrics.jsonl, and its time."""
        began = time.monotonic()
        metrics = step()
        seconds = time.monotonic() - began
        self.seconds += seconds
        metrics["update_tokens_per_s"] = metrics.pop("tokens") / self.clock.pop("optimise", seconds)
        if "sampled_tokens" in metrics:
            metrics["rollout_tokens_per_s"] = metrics["sampled_tokens"] / self.clock.pop("play")
        if self.world.is_first:  # world
            peak = _peak_memory()
            self.run_dir.append_metrics(
                {"step": self.step, **metrics, "seconds": seconds, "peak_memory_bytes": peak}
            )
        self.step += 1
        in_stage = self.step if metrics["stage"] == "imitation" else self.selfplay_index
        self.progress.update(in_stage, metrics)

    def _record(self, groups: Sequence[Group]) -> None:
        """The step's lines in dialogues.jsonl, in the order of the groups of all ranks."""
        records = [[d.record(step=self.step, stage="selfplay") for d in group.dialogues] for group in groups]
        of_all = self.world.gather(records)  # world
        if self.world.is_first:
            self.run_dir.append_dialogues(record for of_group in of_all for record in of_group)

    def _out_of_time(self) -> bool:
        limit = self.config.train.max_seconds
        return self.world.agree(bool(limit) and self.seconds >= limit)  # world

    def _end_of_imitation(self) -> None:
        """Keep the starting policy as `warm_start`, evaluate it, and begin self-play with a fresh
        optimizer."""
        self.run_dir.save_checkpoint(
            "warm_start", lambda folder: write_checkpoint(self.model, self.tokenizer, folder)
        )
        self.warm_start = self._evaluate("warm_start")
        self.optimizer = self._new_optimizer()
        self._save()

    def _evaluate(self, policy: str) -> dict[str, float]:
        self.progress.log(
            f"evaluating {policy.replace('_', ' ')} on {self.config.eval.dialogues} {self.config.eval.split} "
            "dialogues"
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
            "peak_memory_bytes": _peak_memory(),
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
        if self.world.agree(self.stop.is_set()):  # world
            self._save()
            raise Interrupted(f"stopped after step {self.step}; the state is saved")
        if self.step % self.config.train.save_every == 0 and self.step < last:
            self._save()

    def _save(self) -> None:
        keep = self.config.train.keep_checkpoints
        self.run_dir.save_checkpoint(step_name(self.step), self._write, keep)
        self.opponents.forget_before(max(self.selfplay_index, 0))

    def _write(self, folder: Path) -> None:
        write_checkpoint(self.model, self.tokenizer, folder)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "warm_start": self.warm_start,
            "baseline": self.baseline.state_dict(),
            "opponents": self.opponents.state_dict(),
        }
        write_state(folder, state, self.optimizer.state_dict())

    def _restore(self, folder: Path) -> None:
        state, optimizer = read_state(folder, self.config.model.device)
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.warm_start = state["warm_start"]
        self.baseline.load_state_dict(state["baseline"])
        self.opponents.load_state_dict(state["opponents"])
        self.optimizer.load_state_dict(optimizer)


def _sampled(dialogue: Dialogue) -> int:
    """Tokens that were drawn here."""
    return sum(len(turn.logprobs or ()) for turn in dialogue.turns)


def _peak_memory() -> int:
    """Bytes of this process, since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(config: Config, run: RunDir, progress: Progress, stop: threading.Event) -> dict[str, Any]:
    """Train to the end of the configuration and return the summary; `Interrupted` after a save once `stop` is
    set.
    """
    trainer = Trainer(config, run, progress, stop)
    try:
        return trainer.run()
    finally:
        if trainer.judge is not None:
            trainer.judge.close()
        trainer.arena.speakers.close()
