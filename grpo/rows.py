"""From dialogues to training rows: whose tokens of which kind are trained, and with what advantage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from duologue.grpo.advantage import RunningBaseline, group_advantages
from duologue.grpo.packing import Row
from duologue.grpo.sections import GrpoSection
from duologue.grpo.world import ALONE, World
from duologue.rollout.selfplay.dialogue import KINDS, POLICY, Group, View

Players = tuple[str, str]
Reward = tuple[float, float] | None


def view_row(view: View, kinds: tuple[str, ...], advantage: float, dialogue_id: int, role: int) -> Row:
    """A view as a row; the mask is the view's own record of what was sampled."""
    wanted = {KINDS.index(kind) for kind in kinds}
    return Row(
        token_ids=view.token_ids,
        loss_mask=[kind in wanted for kind in view.kinds],
        logprobs=view.logprobs,
        supports=view.supports,
        advantage=advantage,
        dialogue_id=dialogue_id,
        role=role,
    )


def grpo_rows(
    groups: Sequence[Group], config: GrpoSection, baseline: RunningBaseline, world: World = ALONE
) -> tuple[list[Row], dict[str, float]]:
    """A row per (dialogue, trained role that the policy has), or per turn of it where every turn has a
    context of its own, with the advantage of its group written into the dialogues too.

    Unscored dialogues give no row; they are counted. Advantages, baseline and metrics are of the groups of
    all ranks.
    """
    results = world.gather([[(d.players, d.reward) for d in group.dialogues] for group in groups])  # world
    of_all, metrics = _advantages(results, config, baseline)
    advantages = [by_role for of_group in world.share(of_all) for by_role in of_group]  # world
    dialogues = [d for group in groups for d in group.dialogues]
    rows = []
    for i, (dialogue, by_role) in enumerate(zip(dialogues, advantages, strict=True)):
        if dialogue.reward is None or not by_role:
            continue
        dialogue.advantage = by_role.get(0, 0.0), by_role.get(1, 0.0)
        for role, value in by_role.items():
            views = [v for v, of in zip(dialogue.views, dialogue.view_roles, strict=True) if of == role]
            rows += [view_row(view, config.train_kinds, value, i, role) for view in views]
    return rows, metrics


def _advantages(
    results: Sequence[Sequence[tuple[Players, Reward]]], config: GrpoSection, baseline: RunningBaseline
) -> tuple[list[list[dict[int, float]]], dict[str, float]]:
    """Of every group, of every dialogue, the advantage of each trained role that the policy has; and
    metrics."""
    roles = (0, 1) if config.train_roles == "both" else (0,)
    advantages: list[list[dict[int, float]]] = [[{} for _ in group] for group in results]
    members = [
        (g, role, reward, by_role)
        for g, group in enumerate(results)
        for (players, reward), by_role in zip(group, advantages[g], strict=True)
        for role in roles
        if players[role] == POLICY
    ]
    computed = group_advantages(
        torch.tensor([reward[role] if reward else 0.0 for _, role, reward, _ in members]),
        torch.tensor([g for g, *_ in members]),
        torch.tensor([reward is not None for _, _, reward, _ in members]),
        method=config.advantage,
        roles=torch.tensor([role for _, role, *_ in members]) if config.per_role else None,
        baseline=baseline,
    )
    for (_, role, _, by_role), value in zip(members, computed.value.tolist(), strict=True):
        by_role[role] = value
    unscored = sum(reward is None for group in results for _, reward in group)
    return advantages, {
        "no_variance_share": computed.no_variance / max(computed.groups, 1),
        "unscored": float(unscored),
    }
