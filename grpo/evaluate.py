"""How well a policy negotiates: dialogues on held-out scenarios, and the game's own measures."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from duologue.grpo.build import build_arena
from duologue.grpo.config import Config
from duologue.grpo.world import ALONE, World
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.game import Game, Scenario
from duologue.rollout.judge.asking import check_share
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import Dialogue, assign_rewards
from duologue.rollout.selfplay.speakers import Opponent

AT_ONCE = 256  # dialogues: bounds the pool that is needed


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    game: Game,
    config: Config,
    judge: FeedbackJudge | None,
    world: World = ALONE,
) -> tuple[dict[str, float], list[Dialogue]]:
    """`eval.dialogues` dialogues of the policy with itself on `eval.split`, sampled at `eval.temperature`
    (0 = greedy).

    The scenarios and the draws follow from `train.seed` alone, so two policies are compared on the same
    ones. The engine is the policy's; what it holds of the KV is dropped.
    """
    engine.name_weights(0)  # as of an engine of its own
    arena = build_arena(config, engine, tokenizer, game, judge, temperature=config.eval.temperature)
    dialogues = hold(
        arena, draw_contexts(config, game, config.eval.dialogues), config.train.seed, world=world
    )
    assign_rewards(game, dialogues)
    return game.summarise([d.outcome for d in dialogues if d.outcome is not None]), dialogues


def draw_contexts(config: Config, game: Game, n: int) -> list[Scenario]:
    """The first `n` scenarios that players of this configuration are measured on."""
    rng = random.Random(derive_seed(config.train.seed, "eval"))
    return [game.sample(rng, config.eval.split) for _ in range(n)]


def hold(
    arena: Arena,
    scenarios: Sequence[Scenario],
    seed: int,
    opponent: Opponent | None = None,
    turned: bool = False,
    world: World = ALONE,
) -> list[Dialogue]:
    """One dialogue per scenario, with `opponent` on one side of all. `turned`: the side that would have been
    second speaks first. The ranks share them, and each has all.
    """
    dialogues: list[Dialogue] = []
    for start in range(0, len(scenarios), AT_ONCE):
        part, drawn = scenarios[start : start + AT_ONCE], derive_seed(seed, "eval", start)
        openers = [arena.rules.opener(drawn, number, step=0) for number in range(len(part))]
        played: list[Dialogue] = []
        for numbers in world.hand_out([0.0] * len(part)):  # world
            groups = arena.play(
                part,
                group_size=1,
                seed=drawn,
                opponents=[opponent] * len(part),
                openers=[1 - first for first in openers] if turned else openers,
                chosen=numbers,
            )
            played += [group.dialogues[0] for group in groups]
        dialogues += world.gather(played)  # world
        check_lost(arena, world, len(part), arena.from_outside([opponent] * len(part)))  # world
    check_finite(dialogues, "evaluation")
    return dialogues


def check_lost(arena: Arena, world: World, total: int, outside: int) -> None:
    """Over all ranks, each of which sees its own part of `total` dialogues, of which `outside` are with
    somebody outside: RuntimeError when more are unscored than is accepted. Counts begin anew.
    """
    unanswered, unscored = map(int, world.sum(arena.lost))  # world
    arena.lost = 0, 0
    for asked, n, of in ((arena.speakers.outside, unanswered, outside), (arena.judge, unscored, total)):
        if asked is not None and n:
            faults = [fault for fault in world.each(asked.last_fault) if fault]  # world
            check_share(asked, n, of, faults[0] if faults else "")


def check_finite(dialogues: Iterable[Dialogue], when: str) -> None:
    """Raise RuntimeError when a log-prob or a reward of them is NaN or infinite."""
    for dialogue in dialogues:
        total = sum(sum(turn.logprobs or ()) for turn in dialogue.turns)
        if not math.isfinite(total):
            cause = "the weights are not finite, or overflow model.dtype"
            raise RuntimeError(f"{when}: the model's log-probs sum to {total}: {cause}")
        if dialogue.reward is not None and not math.isfinite(sum(dialogue.reward)):
            raise RuntimeError(f"{when}: the reward of a dialogue is {dialogue.reward}")
