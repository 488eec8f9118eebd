"""From dialogues to training rows: whose tokens of which kind are trained, and with what advantage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

from duologue.grpo import credit
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.packing import Row
from duologue.grpo.sections import GrpoSection
from duologue.grpo.world import ALONE, World
from duologue.rollout.selfplay.dialogue import KINDS, Group, View


def view_row(
    view: View,
    kinds: tuple[str, ...],
    advantage: float,
    dialogue_id: int,
    role: int,
    advantages: list[float] | None = None,
) -> Row:
    """A view as a row; the mask is the view's own record of what was sampled."""
    wanted = {KINDS.index(kind) for kind in kinds}
    return Row(
        token_ids=view.token_ids,
        loss_mask=[kind in wanted for kind in view.kinds],
        logprobs=view.logprobs,
        supports=view.supports,
        advantage=advantage,
        advantages=advantages,
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
    results = world.gather([[credit.result(d, config) for d in group.dialogues] for group in groups])  # world
    of_all, metrics = credit.advantages(results, config, baseline)
    advantages = [by_role for of_group in world.share(of_all) for by_role in of_group]  # world
    dialogues = [d for group in groups for d in group.dialogues]
    rows = []
    for i, (dialogue, by_role) in enumerate(zip(dialogues, advantages, strict=True)):
        if dialogue.reward is None or not by_role:
            continue
        dialogue.advantage = by_role.get(0, [0.0])[0], by_role.get(1, [0.0])[0]
        if config.credit == "turn":
            dialogue.turn_advantages = credit.in_order(dialogue, by_role)
        for role, values in by_role.items():
            views = [v for v, of in zip(dialogue.views, dialogue.view_roles, strict=True) if of == role]
            of_tokens = credit.by_token(dialogue, role, values) if config.credit == "turn" else repeat(None)
            rows += [
                view_row(view, config.train_kinds, values[0], i, role, own)
                for view, own in zip(views, of_tokens, strict=False)
            ]
    return rows, metrics
