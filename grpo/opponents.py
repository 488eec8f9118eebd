"""Whom the policy meets: a partner for every group of a step, snapshots to draw from, and how the policy
fares with each.

What a step meets follows from the configuration, the seed, the step and the group's number alone, so that a
resumed run, and any number of ranks, meet the same.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duologue.grpo.build import build_engine
from duologue.grpo.checkpoints import step_name, step_of
from duologue.grpo.config import Config
from duologue.grpo.held import HeldWeights, memory
from duologue.grpo.mix import FROZEN, LAGGED, POOL, SCRIPTED, SELF, START, Place, chosen, places, side
from duologue.grpo.policy import load_beside, load_policy
from duologue.grpo.space import check_space, weight_bytes
from duologue.grpo.world import ALONE, World
from duologue.model.atomic import write_folder
from duologue.model.checkpoint import write_checkpoint
from duologue.model.decoder import Decoder
from duologue.model.files import write_checksums
from duologue.model.lora import Adapter, LoraDecoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.pages import CACHE_TOKENS
from duologue.rollout.games.catalogue import characters
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.dialogue import POLICY, Dialogue, Group
from duologue.rollout.selfplay.speakers import Opponent

START_RATING, RATING_STEP = 1000.0, 32.0


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
    """A scored dialogue of the policy with a partner: what either side got, as reward and in the game's
    points, and the policy's score, a win being more points than the partner has. In self-play both are the
    mean of the sides.
    """

    partner: str
    agreed: bool
    rewards: tuple[float, float]  # the policy's and the partner's
    points: tuple[float, float]
    score: float  # win 1, draw 0.5, loss 0


def matches(group: Group) -> list[Match]:
    """Of a group of dialogues."""
    return [_match(dialogue) for dialogue in group.dialogues if dialogue.reward is not None]


def _match(dialogue: Dialogue) -> Match:
    assert dialogue.reward is not None
    assert dialogue.outcome is not None
    agreed, rewards, points = dialogue.outcome.agreed, dialogue.reward, dialogue.outcome.scores
    if dialogue.players == (POLICY, POLICY):
        reward, point = sum(rewards) / 2, sum(points) / 2
        return Match(SELF, agreed, (reward, reward), (point, point), 0.5)
    own = dialogue.players.index(POLICY)
    mine, theirs = points[own], points[1 - own]
    score = 0.5 * ((mine > theirs) + (mine >= theirs))
    sides = rewards[own], rewards[1 - own]
    return Match(dialogue.players[1 - own], agreed, sides, (mine, theirs), score)


def payoff_table(
    groups: Sequence[Group], world: World = ALONE, partners: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Of the scored dialogues of all ranks with each opponent: how many, how many of them agreed, the mean
    reward and points of both sides, and the policy's mean score.

    `partners` are what the groups count as in place of their opponents' names; self-play has a row then too.
    """
    rows: dict[str, list[Match]] = {}
    for number, of_group in enumerate(world.gather([matches(group) for group in groups])):
        for match in of_group:
            if partners or match.partner != SELF:
                rows.setdefault(partners[number] if partners else match.partner, []).append(match)
    return {name: _payoff(rows[name]) for name in sorted(rows)}


def _payoff(played: Sequence[Match]) -> dict[str, float]:
    n = len(played)
    return {
        "dialogues": n,
        "agreement": sum(match.agreed for match in played) / n,
        "policy": sum(match.rewards[0] for match in played) / n,
        "opponent": sum(match.rewards[1] for match in played) / n,
        "policy_points": sum(match.points[0] for match in played) / n,
        "opponent_points": sum(match.points[1] for match in played) / n,
        "score": sum(match.score for match in played) / n,
    }


@dataclass(eq=False)
class Opponents:
    """`of_groups`, then `score`, then `keep` in each step of self-play, whose steps count from 0."""

    config: Config
    folder: Path
    model: Decoder
    tokenizer: Tokenizer
    engine: Engine
    world: World = ALONE
    longest: int = 0  # tokens that a dialogue can take
    ratings: dict[str, float] = field(default_factory=lambda: {POLICY: START_RATING})
    _slots: list[Adapter] = field(default_factory=list)  # of the snapshots' adapters
    _present: dict[int, int] = field(default_factory=dict)  # the engine's number of a snapshot's adapter
    _met: list[str] = field(default_factory=list)  # the partner of each group of the step

    def __post_init__(self) -> None:
        o, adapters = self.config.opponent, isinstance(self.model, LoraDecoder)
        self.parts = o.parts
        self._frozen = self._load_frozen(Path(o.path)) if FROZEN in self.parts else None
        sets = max(o.held, o.sets(adapters)) - (FROZEN in self.parts)
        self.held = HeldWeights(self.config, self.model, 0 if adapters else sets)

    def members(self, step: int) -> list[int]:
        """The snapshots, by the step that they were taken before, that may be met in this step; the oldest
        first.
        """
        o = self.config.opponent
        steps = {max(0, step - lag) for lag in o.lags}
        if POOL in o.parts:
            steps |= {*self._pool(step)}
        return sorted(steps | {0} if START in o.parts or not steps else steps)

    def _pool(self, step: int) -> range:
        o = self.config.opponent
        return range(0, max(step, 1), o.pool_every)[-o.pool_size :]

    def of_groups(self, step: int, seed: int, reference: Decoder | None = None) -> list[Opponent | None]:
        """Whom each group of the step meets; None is the policy itself.

        `reference` is the policy of step 0 where it is loaded already.
        """
        g = self.config.grpo
        at = places(self.parts, g.groups_per_step, seed)
        snapshots = self._snapshots(step, seed, at)
        present = sorted({snapshot for snapshot in snapshots if snapshot is not None})
        if isinstance(self.model, LoraDecoder):
            self._use_adapters(present)
            engines = dict.fromkeys(present, self.engine)
        else:
            start = reference if START in self.parts else None
            engines = self.held.use({i: self._path(i) for i in present}, start)
        met: list[Opponent | None] = []
        for number, (place, snapshot) in enumerate(zip(at, snapshots, strict=True)):
            role = 1 if g.train_roles == "first" else side(step, number)
            if place.partner == SELF:
                met.append(None)
            elif snapshot is None:
                met.append(self._other(place, role))
            else:
                adapter = self._present.get(snapshot, 0)
                name = _name(snapshot)
                met.append(Opponent(role=role, name=name, engine=engines[snapshot], adapter=adapter))
        self._met = [place.partner for place in at]
        return met

    def _other(self, place: Place, role: int) -> Opponent:
        """Somebody who is no earlier self."""
        kind, _, character = place.partner.partition(":")
        if kind == SCRIPTED:
            character = character or chosen(characters(self.config.game.name), place.at)
            return Opponent(role=role, name=f"{kind}:{character}", character=character)
        return Opponent(role=role, name=kind, engine=self._frozen if kind == FROZEN else None)

    def _snapshots(self, step: int, seed: int, at: Sequence[Place]) -> list[int | None]:
        """Which snapshot each group meets, where its partner is one. With adapters a pool's is drawn for each
        group, otherwise as many for the step as there is room for.
        """
        o, pool = self.config.opponent, self._pool(step)
        weights = range(1, len(pool) + 1) if o.pool_draw == "recent" else [1] * len(pool)
        drawn = random.Random(derive_seed(seed, "opponent")).choices(pool, weights, k=len(at))
        others = {START, *(LAGGED + str(lag) for lag in o.lags)} & self.parts.keys()
        met: list[int | None] = []
        for number, place in enumerate(at):
            if place.partner == POOL and isinstance(self.model, LoraDecoder):
                met.append(drawn[number])
            elif place.partner == POOL:
                met.append(chosen(drawn[: self.held.most - len(others)], place.at))
            elif place.partner.startswith(LAGGED):
                met.append(max(0, step - int(place.partner.removeprefix(LAGGED))))
            else:
                met.append(0 if place.partner == START else None)
        return met

    def notes(self) -> list[str]:
        """What the user should know as self-play begins: whom it meets, and the memory that this takes."""
        if self.parts.keys() == {SELF}:
            return []
        notes = ["partners: " + ", ".join(f"{name} {part:.1%}" for name, part in self.parts.items())]
        if self.held.most:
            each = f"{memory(self.config, self.model)} each"
            notes.append(f"held beside the policy: {self.held.most} of its earlier selves at most, {each}")
        if self._frozen is not None:
            path, takes = self.config.opponent.path, memory(self.config, self._frozen.model)
            notes.append(f"held beside the policy: {path}, {takes}")
        return notes

    @property
    def engines(self) -> list[Engine]:
        """All that play, the policy's first."""
        return [self.engine, *self.held.engines, *([] if self._frozen is None else [self._frozen])]

    def score(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Metrics: the payoff tables of the step, by opponent and by partner, and the ratings after it."""
        if self.parts.keys() == {SELF}:
            return {}
        payoff = payoff_table(groups, self.world)  # world
        update_ratings(self.ratings, {name: row["score"] for name, row in payoff.items()})
        return {
            "payoff": payoff,
            "partners": payoff_table(groups, self.world, self._met),  # world
            "elo": {name: self.ratings[name] for name in (POLICY, *payoff)},
        }

    def keep(self, step: int) -> None:
        """Take a snapshot of the policy as it is before `step`, where one is due. It begins with the policy's
        rating.
        """
        o = self.config.opponent
        if o.lags or (POOL in o.parts and step % o.pool_every == 0):
            if self.world.is_first:
                check_space(self.folder, weight_bytes(self.model), f"the opponent {_name(step)}")
                write_folder(self._path(step), self._write)
            self.world.agree(False)  # world: nobody reads what is not whole
            self.ratings[_name(step)] = self.ratings[POLICY]
        oldest = next((member for member in self.members(step) if member), 0)
        gone = {*map(_name, range(1, oldest))}
        self.ratings = {name: rating for name, rating in self.ratings.items() if name not in gone}

    def go_back(self, step: int) -> None:
        """The policy is what it was before `step` again, and so are the snapshots of it since."""
        taken = [path for path in self.folder.glob("step_*") if step_of(path) > step]
        for path in taken if self.world.is_first else ():
            write_folder(path, self._write)
        self.world.agree(False)  # world: nobody reads what is not whole
        self.held.forget_after(step)
        self._present = {}

    def needed(self, steps: Sequence[int]) -> list[Path]:
        """The snapshots that one of these steps can meet and that are taken before the first of them."""
        o = self.config.opponent
        if not (o.lags or POOL in o.parts or START in o.parts):
            return []
        met = {member for step in steps for member in self.members(step) if member <= steps[0]}
        return [self._path(member) for member in sorted(met)]

    def kept(self, steps: int, behind: int) -> int:
        """Snapshots on disk at once, at most, of a run of so many steps that may be taken up `behind` steps
        ago.
        """
        o = self.config.opponent
        of_lags = min(max(o.lags) + behind, steps) if o.lags else 0
        of_pool = o.pool_size + (0 if o.lags else behind // o.pool_every) if POOL in o.parts else 0
        return of_lags + min(of_pool, steps // o.pool_every)

    def forget_before(self, step: int) -> None:
        """Drop the snapshots that no step from `step` on can meet; a run that resumes there needs the
        others."""
        o = self.config.opponent
        lagged = step - max(o.lags, default=0) if o.lags else step
        for path in self.folder.glob("step_*") if self.world.is_first else ():
            taken = step_of(path)
            pooled = POOL in o.parts and taken % o.pool_every == 0 and taken >= self._pool(step)[0]
            if taken < lagged and not pooled:
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

    def _use_adapters(self, steps: list[int]) -> None:
        """Have the snapshots' adapters beside the policy's in its engine. They are written into slots that
        stay where they are, for CUDA graphs know addresses; adapter 1 is the base with none.
        """
        kept = {step: at for step, at in self._present.items() if step in steps}
        free = [at for at in range(2, 2 + len(self._slots)) if at not in kept.values()]
        self._present = kept
        for step in steps:
            if step in kept:
                continue
            beside = load_beside(self.model, self._path(step))
            if not isinstance(beside, LoraDecoder):
                self._present[step] = 1
            elif free:
                self._present[step] = free.pop(0)
                self._slots[self._present[step] - 2].write_over(beside.adapter)
            else:
                self._slots.append(beside.adapter)
                self._present[step] = 1 + len(self._slots)
        if steps and len(self.engine.adapters) != 2 + len(self._slots):
            self.engine.use_adapters([None, *self._slots])

    def _load_frozen(self, path: Path) -> Engine:
        """The checkpoint that opponent.path names, which must speak in the policy's tokens."""
        try:
            model, tokenizer = load_policy(path, self.config)
        except (ValueError, OSError) as error:
            raise ValueError(f"opponent.path = {str(path)!r}: accepted is a checkpoint ({error})") from error
        if not tokenizer.equals(self.tokenizer):
            raise ValueError(
                f"opponent.path = {str(path)!r}: accepted is a model with the policy's tokenizer"
            )
        room = model.config.max_position_embeddings
        if self.longest > room:
            takes = f"a dialogue can take {self.longest} tokens"
            raise ValueError(f"opponent.path = {str(path)!r}: it has room for {room} tokens, and {takes}")
        return build_engine(self.config, model.requires_grad_(False), CACHE_TOKENS)


def _name(step: int) -> str:
    return step_name(step) if step else START
