"""Whom the policy meets: an opponent for every group of a step, snapshots to draw from, and how the policy
fares against each.

What a step meets follows from the configuration, the seed and the step alone, so that a resumed run meets the
same.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.build import build_engine
from duologue.grpo.checkpoints import step_name, step_of
from duologue.grpo.config import Config
from duologue.grpo.policy import load_beside
from duologue.grpo.world import ALONE, World
from duologue.model.atomic import write_folder
from duologue.model.checkpoint import load_weights, write_checkpoint
from duologue.model.decoder import Decoder, empty_decoder
from duologue.model.files import write_checksums
from duologue.model.lora import LoraDecoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.pages import CACHE_TOKENS
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.dialogue import POLICY, Group
from duologue.rollout.selfplay.speakers import Opponent

START_RATING, RATING_STEP = 1000.0, 32.0
START, SERVER = "start", "endpoint"


def update_ratings(ratings: dict[str, float], scores: Mapping[str, float]) -> None:
    """Elo: one match of the policy against each opponent, by its mean score (win 1, draw 0.5, loss 0).

    R moves by 32 (score - expected), expected = 1 / (1 + 10^((R' - R) / 400)), the opponent's by as much the
    other way. All are expected by the ratings before the step, so the order does not matter. Who is new has
    the policy's rating.
    """
    for name in scores:
        ratings.setdefault(name, ratings[POLICY])
    before = dict(ratings)
    for name, score in sorted(scores.items()):
        expected = 1 / (1 + 10 ** ((before[name] - before[POLICY]) / 400))
        ratings[POLICY] += RATING_STEP * (score - expected)
        ratings[name] -= RATING_STEP * (score - expected)


@dataclass(frozen=True, slots=True)
class Match:
    """A scored dialogue with an opponent: the rewards of both sides, and the policy's score, a win being more
    of the game's points than the opponent has.
    """

    opponent: str
    policy_reward: float
    opponent_reward: float
    score: float  # win 1, draw 0.5, loss 0


def matches(group: Group) -> list[Match]:
    """Of a group of dialogues."""
    scored = []
    for dialogue in group.dialogues:
        if dialogue.reward is None or dialogue.players == (POLICY, POLICY):
            continue
        assert dialogue.outcome is not None
        side = dialogue.players.index(POLICY)
        points, other = dialogue.outcome.scores[side], dialogue.outcome.scores[1 - side]
        score = 0.5 * ((points > other) + (points >= other))
        scored.append(
            Match(dialogue.players[1 - side], dialogue.reward[side], dialogue.reward[1 - side], score)
        )
    return scored


def payoff_table(groups: Sequence[Group], world: World = ALONE) -> dict[str, dict[str, float]]:
    """Of the matches of all ranks with each opponent: how many, the mean reward of both sides, and the
    policy's mean score.
    """
    played = [match for of_group in world.gather([matches(group) for group in groups]) for match in of_group]
    table = {}
    for name in sorted({match.opponent for match in played}):
        against = [match for match in played if match.opponent == name]
        n = len(against)
        table[name] = {
            "dialogues": n,
            "policy": sum(match.policy_reward for match in against) / n,
            "opponent": sum(match.opponent_reward for match in against) / n,
            "score": sum(match.score for match in against) / n,
        }
    return table


@dataclass(eq=False)
class Opponents:
    """`of_groups`, then `score`, then `keep` in each step of self-play, whose steps count from 0."""

    config: Config
    folder: Path
    model: Decoder
    tokenizer: Tokenizer
    engine: Engine
    world: World = ALONE
    ratings: dict[str, float] = field(default_factory=lambda: {POLICY: START_RATING})
    _present: list[int] = field(default_factory=list)  # whose adapters, or weights, the engine has
    _own: Engine | None = None  # on a second set of weights

    def members(self, step: int) -> list[int]:
        """The snapshots, by the step that they were taken before, that may be met in this step; the oldest
        first.
        """
        o = self.config.opponent
        if o.kind == "pool":
            return list(range(0, max(step, 1), o.pool_every))[-o.pool_size :]
        return [max(0, step - o.lag) if o.lag else 0]

    def of_groups(self, step: int, seed: int, reference: Decoder | None = None) -> list[Opponent | None]:
        """Whom each group of the step meets. Its side changes in a rhythm other than the first speaker's.

        `reference` is the policy of step 0 where it is loaded already.
        """
        o, g = self.config.opponent, self.config.grpo
        groups = range(g.groups_per_step)
        if o.kind == "self":
            return [None for _ in groups]
        roles = [1 if g.train_roles == "first" else (i // 2 + step // 2) % 2 for i in groups]
        if o.kind == "endpoint":
            return [Opponent(role=role, name=SERVER) for role in roles]
        members, rng = self.members(step), random.Random(derive_seed(seed, "opponent"))
        weights = range(1, len(members) + 1) if o.pool_draw == "recent" else [1] * len(members)
        if not isinstance(self.model, LoraDecoder):
            member = rng.choices(members, weights)[0]
            engine = self._with_weights(member, reference)
            return [Opponent(role=role, name=_name(member), engine=engine) for role in roles]
        drawn = rng.choices(members, weights, k=len(groups))
        present = sorted(set(drawn))
        engine = self._with_adapters(present)
        return [
            Opponent(role=role, name=_name(i), engine=engine, adapter=1 + present.index(i))
            for role, i in zip(roles, drawn, strict=True)
        ]

    @property
    def engines(self) -> list[Engine]:
        """All that play, the policy's first."""
        return [engine for engine in (self.engine, self._own) if engine is not None]

    def score(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Metrics: the payoff table of the step, and the ratings after it."""
        if self.config.opponent.kind == "self":
            return {}
        payoff = payoff_table(groups, self.world)  # world
        update_ratings(self.ratings, {name: row["score"] for name, row in payoff.items()})
        return {"payoff": payoff, "elo": {name: self.ratings[name] for name in (POLICY, *payoff)}}

    def keep(self, step: int) -> None:
        """Take a snapshot of the policy as it is before `step`, where one is due. It begins with the policy's
        rating.
        """
        o = self.config.opponent
        if o.lag or (o.kind == "pool" and step % o.pool_every == 0):
            write_folder(self._path(step), self._write)
            self.ratings[_name(step)] = self.ratings[POLICY]
        named = {POLICY, START, SERVER, *map(_name, range(self.members(step)[0], step + 1))}
        self.ratings = {name: rating for name, rating in self.ratings.items() if name in named}

    def needed(self, steps: Sequence[int]) -> list[Path]:
        """The snapshots that one of these steps can meet and that are taken before the first of them."""
        if self.config.opponent.kind in ("self", SERVER):
            return []
        met = {member for step in steps for member in self.members(step) if member <= steps[0]}
        return [self._path(member) for member in sorted(met)]

    def forget_before(self, step: int) -> None:
        """Drop the snapshots that no step from `step` on can meet; a run that resumes there needs the
        others."""
        oldest = self.members(step)[0]
        for path in self.folder.glob("step_*"):
            if step_of(path) < oldest:
                shutil.rmtree(path)

    def state_dict(self) -> dict[str, Any]:
        return {"ratings": self.ratings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ratings = dict(state["ratings"])

    # ---- snapshots -----------------------------------------------------------------------------------------

    def _write(self, folder: Path) -> None:
        write_checkpoint(self.model, self.tokenizer, folder)
        write_checksums(folder)

    def _path(self, step: int) -> Path:
        return self.folder / _name(step) if step else self.folder.parent / "checkpoints" / "warm_start"

    def _with_adapters(self, steps: list[int]) -> Engine:
        """The policy's engine, which then has the snapshots' adapters beside the policy's."""
        if steps != self._present:
            beside = [load_beside(self.model, self._path(step)) for step in steps]
            self.engine.use_adapters([getattr(other, "adapter", None) for other in beside])
            self._present = steps
        return self.engine

    @torch.no_grad()
    def _with_weights(self, step: int, reference: Decoder | None) -> Engine:
        """An engine on a second set of weights, which are written over where others were met before."""
        if self._own is None:
            frozen = self.config.opponent.kind == "frozen"  # never written over: a KL term's may serve
            other = (frozen and reference) or load_beside(self.model, self._path(step))
            self._own = build_engine(self.config, other, CACHE_TOKENS)  # the policy's pool took what was free
        elif self._present != [step]:
            other = empty_decoder(self.model.config)
            load_weights(other, self._path(step), "cpu", self.model.head_weight.dtype)
            for mine, new in zip(self._own.model.parameters(), other.parameters(), strict=True):
                mine.copy_(new)
        self._present = [step]
        return self._own


def _name(step: int) -> str:
    return step_name(step) if step else START
