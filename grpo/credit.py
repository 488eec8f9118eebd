"""What each turn is trained with: the whole reward of its dialogue, or what came from it on (`grpo.credit`).

With P(k) what the dialogue would have been worth to a side had it ended before turn k, turn k earns
P(k + 1) - P(k) and the last one R - P(last); these add up to R - P(0). The reward-to-go of turn k is
therefore R - P(k). P(k) is known before turn k is drawn, so the expected policy gradient is that of R (Sutton
and Barto 2018, section 13.4); Ng, Harada and Russell (1999) make the same argument with potentials. With a
score at the end alone P is 0, and every turn has R, as with `grpo.credit = "dialogue"`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from duologue.grpo.advantage import RunningBaseline, turn_advantages
from duologue.grpo.sections import GrpoSection
from duologue.rollout.selfplay.dialogue import POLICY, PROMPT, Dialogue

Players = tuple[str, str]
Reward = tuple[float, float] | None
Returns = list[list[float]]  # of either side's turns


def result(dialogue: Dialogue, config: GrpoSection) -> tuple[Players, Reward, Returns]:
    """Of every side what each of its turns is compared by, one for all with credit by dialogue."""
    reward = dialogue.reward
    returns = [[value] for value in reward or (0.0, 0.0)]
    if config.credit == "turn" and reward is not None:
        returns = [_own(dialogue, side) or returns[side] for side in (0, 1)]
    return dialogue.players, reward, returns


def advantages(
    results: Sequence[Sequence[tuple[Players, Reward, Returns]]],
    config: GrpoSection,
    baseline: RunningBaseline,
) -> tuple[list[list[dict[int, list[float]]]], dict[str, float]]:
    """Of every group, of every dialogue, the advantages of each trained role that the policy has; and
    metrics."""
    roles = (0, 1) if config.train_roles == "both" else (0,)
    found: list[list[dict[int, list[float]]]] = [[{} for _ in group] for group in results]
    members = [
        (g, role, reward, returns[role], by_role)
        for g, group in enumerate(results)
        for (players, reward, returns), by_role in zip(group, found[g], strict=True)
        for role in roles
        if players[role] == POLICY
    ]
    values, computed = turn_advantages(
        [returns for *_, returns, _ in members],
        torch.tensor([g for g, *_ in members]),
        torch.tensor([reward is not None for _, _, reward, *_ in members]),
        method=config.advantage,
        roles=torch.tensor([role for _, role, *_ in members]) if config.per_role else None,
        baseline=baseline,
    )
    for (_, role, *_, by_role), of_member in zip(members, values, strict=True):
        by_role[role] = of_member
    unscored = sum(reward is None for group in results for _, reward, _ in group)
    return found, {
        "no_variance_share": computed.no_variance / max(computed.groups, 1),
        "unscored": float(unscored),
    }


def _own(dialogue: Dialogue, side: int) -> list[float]:
    """The reward-to-go from each of the side's own turns on, of a dialogue that is scored."""
    assert len(dialogue.returns) == len(dialogue.spoken), "a turn without the score before it"
    of_turns = zip(dialogue.spoken, dialogue.returns, strict=True)
    return [to_go[side] for turn, to_go in of_turns if turn.role == side]


def by_token(dialogue: Dialogue, side: int, values: Sequence[float]) -> list[list[float]]:
    """For each of the side's contexts [t] the value of the turn that a token belongs to, 0 where it spoke
    none. `values` are those of its turns; a side without a turn may have one.
    """
    views = [view for view, of in zip(dialogue.views, dialogue.view_roles, strict=True) if of == side]
    own = [turn for turn in dialogue.spoken if turn.role == side]
    tokens = [value for turn, value in zip(own, values, strict=False) for _ in turn.token_ids]
    assert len(tokens) == sum(kind != PROMPT for view in views for kind in view.kinds), "not these turns"
    left = iter(tokens)
    return [[0.0 if kind == PROMPT else next(left) for kind in view.kinds] for view in views]


def in_order(dialogue: Dialogue, by_side: dict[int, list[float]]) -> tuple[float, ...]:
    """The advantage of each turn that was spoken, from those of either side's own; 0 where none is
    trained."""
    left = {side: iter(values) for side, values in by_side.items()}
    return tuple(next(left[turn.role]) if turn.role in left else 0.0 for turn in dialogue.spoken)
