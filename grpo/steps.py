"""The two kinds of training step, on one set of weights: imitate; or negotiate with oneself and learn.

    groups = self.play()                      # both sides are the policy, or one is an opponent
    rows, of_rows = grpo_rows(groups, ...)    # one packed row per dialogue and side, with its advantage
    of_update = self.update(rows)             # in place: the engine has the new weights at once

Every random draw follows from (seed, stage, step). What is marked `# world` is where the processes of a run
meet (grpo/world.py).
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from duologue.grpo import build, policy
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.bad_updates import BadUpdates, Gradient
from duologue.grpo.config import Config
from duologue.grpo.evaluate import check_lost
from duologue.grpo.imitation import accumulate_imitation_gradient, demonstration_batch, imitated
from duologue.grpo.kl import kl_to_reference
from duologue.grpo.microbatch import fitted
from duologue.grpo.opponents import Opponents
from duologue.grpo.optimizer import learning_rate
from duologue.grpo.packing import Row
from duologue.grpo.rounds import play_again, play_groups, round_metrics
from duologue.grpo.rows import grpo_rows
from duologue.grpo.run_dir import RunDir
from duologue.grpo.shares import Lengths, dealt, joint_costs, rows_of_all, sampled_tokens
from duologue.grpo.update import UpdateStats, accumulate_policy_gradient
from duologue.grpo.world import World
from duologue.model.decoder import Decoder
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.dialogue import Group

Metrics = dict[str, Any]


class Steps:
    """What a step works on, and the steps. `step` counts those that are done, of both kinds together."""

    def __init__(self, config: Config, run: RunDir, world: World) -> None:
        policy.use_device(config)
        self.config = config = fitted(config, world.size, world)
        self.run_dir = run
        self.world = world
        self.game = build.build_game(config)
        self.judge = build.build_judge(
            config, run.path / "judge.sqlite", lambda: (self.start_weights(), self.tokenizer), world
        )
        latest = run.latest_checkpoint()
        if latest is None:
            policy.check_path(config)
        self.corpus = build.build_corpus(config, self.game)
        texts = self.corpus or ([] if latest else build.first_texts(config, self.game))
        self.model, self.tokenizer = policy.build_policy(config, texts, latest)
        self.model.recompute = config.train.recompute
        self.model.library_backward = config.train.attention_backward == "library"
        self.optimizer = build.build_optimizer(config, self.model, world)
        engine = build.build_engine(config, self.model)
        self.arena = build.build_arena(config, engine, self.tokenizer, self.game, self.judge)
        build.add_server(config, self.arena, run.path / "opponent.sqlite", world)
        folder, longest = run.path / "opponents", self.arena.contexts.longest()
        self.opponents = Opponents(config, folder, self.model, self.tokenizer, engine, world, longest=longest)
        self.baseline = RunningBaseline()
        self.bad = BadUpdates(config.train.max_bad_updates)
        self.reference: Decoder | None = None  # the policy that self-play began with, where it is needed
        self.step, self.rate_scale = 0, 1.0
        self.clock: dict[str, float] = {}  # seconds of the parts of this step
        self.scores: Metrics = {}  # of this step: the judge's costs, how the policy fared against opponents
        self.played: Sequence[Group] = ()  # by this step
        self.lengths = Lengths()

    def start_weights(self) -> Decoder:
        """Those that self-play began with."""
        return policy.load_beside(self.model, self.run_dir.path / "checkpoints" / "warm_start")

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.clock[part] = time.monotonic() - began

    @property
    def selfplay_index(self) -> int:
        """Steps of self-play done."""
        return self.step - self.config.imitation.steps

    def _seed(self, *what: str | int) -> int:
        return derive_seed(self.config.train.seed, *what, self.step)

    # ---- a step of self-play -------------------------------------------------------------------------------

    def selfplay_step(self) -> Metrics:
        groups = self.play()
        rows, of_rows = grpo_rows(groups, self.config.grpo, self.baseline, self.world)
        of_update = self.update(rows)
        self.opponents.keep(self.selfplay_index + 1)
        return {**self.outcomes(groups), **of_rows, **of_update}

    def play(self) -> list[Group]:
        """This rank's groups of the step, with their rewards and what they cost."""
        c = self.config.grpo
        rng = random.Random(self._seed("scenarios"))
        scenarios = [self.game.sample(rng, "train") for _ in range(c.groups_per_step)]
        opponents = self.opponents.of_groups(self.selfplay_index, self._seed("opponents"), self.reference)
        for engine in self.opponents.engines:
            engine.name_weights(self.step)  # the same in a resumed run
        play = partial(play_groups, self.arena, c, opponents=opponents, step=self.step)
        played: dict[int, Group] = {}  # by their numbers in the step
        self.arena.lost = 0, 0
        with self.timing("play"):
            for numbers in self.world.hand_out(self.lengths.expected(opponents)):  # world
                played |= play(scenarios, self._seed("play"), numbers)
            outside = self.arena.from_outside(opponents)
            check_lost(self.arena, self.world, c.group_size * len(scenarios), c.group_size * outside)  # world
            play_again(played, scenarios, self.game, c, self._seed("again"), play)
        self.played = [*played.values()]
        costs = joint_costs(self.world.each({} if self.judge is None else self.judge.costs()))  # world
        payoff = self.opponents.score([group.drawn for group in self.played])
        self.scores = {**costs, **payoff, **round_metrics(self.played, c, self.world)}
        return self.played

    def outcomes(self, groups: Sequence[Group]) -> Metrics:
        """What came of the dialogues of all ranks as they were drawn at first, by the game's measures."""
        ended = [
            [(d.outcome, d.reward, d.players, sampled_tokens(d)) for d in group.drawn.dialogues]
            for group in groups
        ]
        of_all = [dialogue for group in self.world.gather(ended) for dialogue in group]  # world
        self.lengths.note((players, sampled) for *_, players, sampled in of_all)
        rewards = [sum(reward) / 2 for _, reward, *_ in of_all if reward is not None]
        return {
            **self.game.summarise([outcome for outcome, *_ in of_all if outcome is not None]),
            "stage": "selfplay",
            "reward": sum(rewards) / max(len(rewards), 1),
            **self.scores,
            "sampled_tokens": sum(n for *_, n in of_all) + self.scores.get("resampled_tokens", 0),
        }

    def update(self, rows: Sequence[Row]) -> Metrics:
        """All updates of this step, in place, and how far the policy is from where it started."""
        metrics: Metrics = {}
        t, temperature = self.config.train, self.config.dialogue.temperature
        rows = rows_of_all(rows, self.config.grpo.group_size, len(self.played), self.world)  # world
        rows = dealt(rows, self.world, t.shares)  # world
        if self.config.rollout.released:
            for engine in self.opponents.engines:
                engine.release_memory()
        if self.reference is not None and t.kl_every and self.selfplay_index % t.kl_every == 0:
            how: Any = {"max_tokens": t.tokens_per_microbatch, "world": self.world, "shares": t.shares}
            metrics["kl_start"] = kl_to_reference(self.reference, rows, temperature=temperature, **how)
        with self.timing("optimise"):
            return metrics | self.optimise(rows)

    def optimise(self, rows: Sequence[Row]) -> Metrics:
        """Of several updates on one rollout the statistics are the first's, but the gradient norm, the rate
        and `kl_old`, how far the policy had moved from the one that sampled, are the last's.
        """
        c = self.config.grpo
        at, total = self.selfplay_index, self.config.train.steps
        peak = c.learning_rate * self.rate_scale
        lr = learning_rate(at, peak=peak, warmup_steps=c.warmup_steps, total_steps=total, schedule=c.schedule)
        every = []
        for epoch in range(c.updates_per_rollout):
            every.append(self._policy_gradient(rows, epoch))
            if c.imitation_coef:
                self._imitation_gradient(
                    self._seed("mixed", epoch), c.imitation_coef, self._seed("mixed dropout", epoch)
                )
            norm = self._optimizer_step(lr)
        metrics = every[0].metrics() | {"kl_old": every[-1].metrics()["kl_old"], "grad_norm": norm, "lr": lr}
        if not metrics.pop("trained_tokens"):
            del metrics["entropy"]  # no group had variance: of no token was it computed
        return metrics

    def _policy_gradient(self, rows: Sequence[Row], epoch: int) -> UpdateStats:
        d = self.config.dialogue
        gradient = partial(
            accumulate_policy_gradient,
            self.model,
            config=self.config.grpo.loss_config,
            temperature=d.temperature,
            max_tokens=self.config.train.tokens_per_microbatch,
            reference=self.reference,
            budget=d.max_rounds * d.max_tokens_per_turn + d.max_tokens_final,
            dropout_seed=self._seed("dropout", epoch),
        )
        return self._accumulate("dialogues", gradient, rows)

    def _accumulate(self, what: str, gradient: Gradient, rows: Sequence[Row]) -> UpdateStats:
        where = {"world": self.world, "shares": self.config.train.shares}
        optimizer = self.optimizer
        stats = gradient(rows=rows, after_part=optimizer.accumulate, backward=optimizer.backward, **where)
        self.bad.note(what, gradient, rows, stats)
        return stats

    def _optimizer_step(self, lr: float) -> float:
        """The gradient norm; where anything is not finite the weights stay as they are."""
        squared = float(self.optimizer.squared_grad_norm())
        if reason := self.bad.reason(math.sqrt(squared)):
            self.optimizer.drop_gradients()
            self.bad.skip(self.step, reason, self.model, self.world)
        else:
            self.optimizer.step(lr, squared)
            self.bad.taken()
        return math.sqrt(squared)

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
        c = self.config.imitation
        demonstrations = demonstration_batch(
            self.corpus,
            self.tokenizer,
            c.dialogues_per_step,
            seed,
            c.final_weight,
            c.decisive_weight,
            self.model.config.max_position_embeddings,
        )
        gradient = partial(
            accumulate_imitation_gradient,
            self.model,
            max_tokens=self.config.train.tokens_per_microbatch,
            coefficient=coefficient,
            dropout_seed=dropout_seed,
            total=imitated(demonstrations),
        )
        rows = dealt(demonstrations, self.world, self.config.train.shares)  # world
        return self._accumulate("demonstrations", gradient, rows)
