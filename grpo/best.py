"""The small held-out evaluations of a run while it trains, and the best policy that they have met.

Before self-play and after every `eval.every` steps of it the policy talks with itself and, in both seats,
with its start. Scenarios and draws follow from `train.seed` alone: all these evaluations of a run are held on
the same ones, which are others than those of `evaluate`.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duologue.grpo.build import build_arena
from duologue.grpo.checkpoints import json_object
from duologue.grpo.config import Config
from duologue.grpo.crossplay import Player
from duologue.grpo.evaluate import hold
from duologue.grpo.opponents import payoff_table
from duologue.grpo.world import ALONE, World
from duologue.rollout.games.game import Game
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.dialogue import Dialogue, Group, assign_rewards
from duologue.rollout.selfplay.speakers import Opponent

BEST = "best"  # the checkpoint
NOTE = "best.json"  # in it: after how many steps it was taken, and why
ITSELF = "itself"
Measures = dict[str, dict[str, float]]  # by whom the policy met


def measured(
    policy: Player,
    start: Player | None,
    game: Game,
    config: Config,
    judge: FeedbackJudge | None,
    world: World = ALONE,
) -> Measures:
    """How the policy fares with itself, by the game's measures and its mean reward, and with its start, as a
    payoff (`agreement`, `policy`, `opponent`, `policy_points`, `opponent_points`, `score`).
    """
    assert policy.engine is not None
    assert policy.tokenizer is not None
    policy.engine.name_weights(0)  # as of an engine of its own
    arena = build_arena(config, policy.engine, policy.tokenizer, game, judge, config.eval.temperature)
    rng = random.Random(derive_seed(config.train.seed, BEST))
    scenarios = [game.sample(rng, config.eval.split) for _ in range(config.eval.every_dialogues)]
    seed = derive_seed(config.train.seed, BEST, "draws")

    def held(opponent: Opponent | None) -> list[Dialogue]:
        dialogues = hold(arena, scenarios, seed, opponent, world=world)
        assign_rewards(game, dialogues)
        return dialogues

    alone = held(None)
    rewards = [sum(d.reward) / 2 for d in alone if d.reward is not None]
    mean = sum(rewards) / len(rewards) if rewards else math.nan
    outcomes = [d.outcome for d in alone if d.outcome is not None]
    measures = {ITSELF: {**game.summarise(outcomes), "reward": mean}}
    if start is not None:
        start_roles = (Opponent(role=role, name=start.name, engine=start.engine) for role in (0, 1))
        groups = [Group(scenario=d.scenario, dialogues=[d]) for role in start_roles for d in held(role)]
        measures |= payoff_table(groups)
    return measures


@dataclass(eq=False)
class Best:
    """The best evaluation so far, by `train.best_by`."""

    by: str
    step: int = -1  # steps that were done; -1: none yet
    value: float = math.nan
    waited: int = 0  # evaluations since
    seconds: float = 0.0  # of all evaluations

    def note(self, step: int, measures: Measures) -> None:
        """The evaluation after `step` steps; ValueError where it has not what `train.best_by` names."""
        whom, _, name = self.by.lstrip("-").rpartition(":")
        of_partner = measures.get(whom or ITSELF, {})
        if name not in of_partner:
            if not of_partner:
                return  # nothing was scored
            accepted = f"one of {', '.join(of_partner)}"
            raise ValueError(
                f"train.best_by = {self.by!r}: accepted is {accepted}, '-' before it for the least"
            )
        value = of_partner[name] * (-1 if self.by.startswith("-") else 1)
        if value > self.signed or (self.step < 0 and not math.isnan(value)):
            self.step, self.value, self.waited = step, of_partner[name], 0
        else:
            self.waited += 1

    @property
    def signed(self) -> float:
        """The more the better."""
        return -self.value if self.by.startswith("-") else self.value

    def written(self, checkpoint: Path) -> bool:
        """Whether this checkpoint is that of the best evaluation."""
        note = checkpoint / NOTE
        return note.is_file() and json_object(note).get("step") == self.step

    def write_note(self, folder: Path) -> None:
        (folder / NOTE).write_text(json.dumps(self.summary()), "utf-8")

    def summary(self) -> dict[str, Any]:
        return {"step": self.step, "by": self.by, "value": self.value}

    def state_dict(self) -> dict[str, Any]:
        more = {"waited": self.waited, "seconds": self.seconds}
        return {**self.summary(), **more} if self.step >= 0 else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
