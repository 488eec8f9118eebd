"""The groups of a step as they are played: each once, and those in which nothing is to be learned again from
other scenarios (the dynamic sampling of DAPO, Yu et al. 2025, arXiv 2503.14476).

Rounds and group numbers name every draw, and a group stays with the rank that played it first, so ranks need
not speak to each other in between.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.evaluate import check_finite
from duologue.grpo.rows import grpo_rows
from duologue.grpo.sections import GrpoSection
from duologue.grpo.shares import sampled_tokens
from duologue.grpo.world import World
from duologue.rollout.games.game import Game, Scenario
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import Group, assign_rewards

TRIES = 16  # draws of a scenario that was not played under this number in this step
Numbered = dict[int, Group]  # by the number of the group in its step
Play = Callable[[Sequence[Scenario], int, Sequence[int]], Numbered]


def play_groups(
    arena: Arena,
    config: GrpoSection,
    scenarios: Sequence[Scenario],
    seed: int,
    numbers: Sequence[int],
    **how: Any,
) -> Numbered:
    """The groups of these numbers, with their rewards; `how` is as in `Arena.play`."""
    groups = arena.play(scenarios, group_size=config.group_size, seed=seed, chosen=numbers, **how)
    dialogues = [dialogue for group in groups for dialogue in group.dialogues]
    assign_rewards(arena.game, dialogues)
    check_finite(dialogues, f"step {how['step']}")
    return dict(zip(numbers, groups, strict=True))


def play_again(
    played: Numbered, scenarios: Sequence[Scenario], game: Game, config: GrpoSection, seed: int, play: Play
) -> None:
    """Put another group in the place of each that teaches nothing, until it does or `grpo.resample` rounds
    are through. A group keeps those that it replaces in `dropped`.
    """
    scenarios, numbers = [*scenarios], [*played]
    for number_of_round in range(config.resample):
        numbers = [number for number in numbers if not teaches(played[number], config)]
        if not numbers:
            return
        of_round = derive_seed(seed, number_of_round)
        for number in numbers:
            met = {scenarios[number].id, *(group.scenario.id for group in played[number].dropped)}
            scenarios[number] = _another(game, met, random.Random(derive_seed(of_round, "scenario", number)))
        for number, group in play(scenarios, derive_seed(of_round, "play"), numbers).items():
            before, played[number] = played[number], group
            group.dropped = (*before.dropped, before)
            before.dropped = ()


def _another(game: Game, met: set[str], rng: random.Random) -> Scenario:
    for _ in range(TRIES):
        scenario = game.sample(rng, "train")
        if scenario.id not in met:
            break
    return scenario


def teaches(group: Group, config: GrpoSection) -> bool:
    """Whether any token of it would be trained with an advantage other than 0."""
    rows, _ = grpo_rows([group], config, RunningBaseline())
    return any(row.teaches for row in rows)


def round_metrics(groups: Sequence[Group], config: GrpoSection, world: World) -> Mapping[str, float]:
    """Of the groups of all ranks, where some may be played again: how many were, the dialogues and tokens
    that this took, the unscored among those that were dropped, and the share of groups in which nothing is to
    be learned, before and after.
    """
    if not config.resample:
        return {}
    counts = world.gather([_counts(group, config) for group in groups])  # world
    again, dialogues, tokens, unscored, before, after = (sum(column) for column in zip(*counts, strict=True))
    return {
        "resampled_groups": again,
        "resampled_dialogues": dialogues,
        "resampled_tokens": tokens,
        "dropped_unscored": unscored,
        "flat_share_before": before / len(counts),
        "flat_share_after": after / len(counts),
    }


def _counts(group: Group, config: GrpoSection) -> tuple[int, ...]:
    """Of a group and those that it replaced, what `round_metrics` sums."""
    flat = not teaches(group, config)
    if not group.dropped:
        return 0, 0, 0, 0, flat, flat
    later = [d for other in (*group.dropped[1:], group) for d in other.dialogues]
    unscored = sum(d.reward is None for other in group.dropped for d in other.dialogues)
    return 1, len(later), sum(map(sampled_tokens, later)), unscored, 1, flat
