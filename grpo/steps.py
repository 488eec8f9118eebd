"""The two kinds of training step, on one set of weights: imitate; or negotiate with oneself and learn.

    groups = self.play()                      # both sides are the policy, or one is an opponent
    rows, of_rows = grpo_rows(groups, ...)    # one packed row per dialogue and side, with its advantage
    of_update = self.update(rows)             # in place: the engine has the new weights at once

Every random draw follows from (seed, stage, step). What is marked `# world` is where the processes of a run
meet (grpo/world.py).
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.config import Config
from duologue.grpo.opponents import Opponents
from duologue.grpo.optimizer import Optimizer, learning_rate
from duologue.grpo.packing import Row
from duologue.grpo.rows import demonstration_batch, grpo_rows
from duologue.grpo.update import (
    UpdateStats,
    accumulate_imitation_gradient,
    accumulate_policy_gradient,
    kl_to_reference,
)
from duologue.grpo.world import World
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.games.game import Game
from duologue.rollout.games.scripted import ScriptedDialogue
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import Dialogue, Group, assign_rewards

Metrics = dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])


def clocked(method: Method) -> Method:
    """A method whose seconds go into its `clock`, by the method's name."""

    @functools.wraps(method)
    def timed(self: Steps, *arguments: Any) -> Any:
        began = time.monotonic()
        result = method(self, *arguments)
        self.clock[method.__name__] = time.monotonic() - began
        return result

    return cast(Method, timed)


class Steps:
    """What a step works on. `step` counts those that are done, of both kinds together."""

    config: Config
    world: World
    game: Game
    judge: FeedbackJudge | None  # None: the game's rules score
    corpus: list[ScriptedDialogue]  # scripted dialogues to imitate
    model: Decoder
    tokenizer: Tokenizer
    optimizer: Optimizer
    arena: Arena
    opponents: Opponents
    baseline: RunningBaseline
    reference: Decoder | None = None  # the policy that self-play began with, where it is needed
    step: int = 0
    clock: dict[str, float]  # seconds of the parts of this step
    scores: Metrics  # of this step: what the judge cost, how the policy fared against opponents
    played: Sequence[Group] = ()  # by this step

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

    @clocked
    def play(self) -> list[Group]:
        """This rank's groups of the step, with their rewards and what they cost."""
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
        self.played = groups
        return groups

    def outcomes(self, groups: Sequence[Group]) -> Metrics:
        """What came of the dialogues of all ranks, by the game's measures, and their scores."""
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
            limit = t.tokens_per_microbatch
            metrics["kl_start"] = kl_to_reference(
                self.reference, rows, temperature=temperature, max_tokens=limit, world=self.world
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


def _sampled(dialogue: Dialogue) -> int:
    """Tokens that were drawn here."""
    return sum(len(turn.logprobs or ()) for turn in dialogue.turns)
