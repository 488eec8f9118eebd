"""From dialogues to training rows: whose tokens of which kind are trained, and with what advantage."""

from __future__ import annotations

import random

import torch
from duologue.grpo.advantage import RunningBaseline, group_advantages
from duologue.grpo.config import GrpoSection
from duologue.grpo.packing import Row
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.games.scripted import ScriptedDialogue
from duologue.rollout.selfplay.dialogue import FINAL, KINDS, POLICY, UTTERANCE, Group, Transcript, View


def view_row(view: View, kinds: tuple[str, ...], advantage: float, dialogue_id: int, role: int) -> Row:
    """A view as a row; the mask is the view's own record of what was sampled."""
    wanted = {KINDS.index(kind) for kind in kinds}
    return Row(
        token_ids=view.token_ids,
        loss_mask=[kind in wanted for kind in view.kinds],
        logprobs=view.logprobs,
        kept=view.kept,
        advantage=advantage,
        dialogue_id=dialogue_id,
        role=role,
    )


def grpo_rows(
    groups: list[Group], config: GrpoSection, baseline: RunningBaseline
) -> tuple[list[Row], dict[str, float]]:
    """A row per (dialogue, trained role that the policy has), or per turn of it where every turn has a context of its own, with the
    advantage of its group written into the dialogues too.

    Unscored dialogues give no row; they are counted.
    """
    roles = (0, 1) if config.train_roles == "both" else (0,)
    dialogues = [(g, d) for g, group in enumerate(groups) for d in group.dialogues]
    members = [
        (g, i, d, role) for i, (g, d) in enumerate(dialogues) for role in roles if d.players[role] == POLICY
    ]
    scored = torch.tensor([d.reward is not None for _, _, d, _ in members])
    found = group_advantages(
        torch.tensor([d.reward[role] if d.reward else 0.0 for _, _, d, role in members]),
        torch.tensor([g for g, _, _, _ in members]),
        scored,
        method=config.advantage,
        roles=torch.tensor([role for _, _, _, role in members]) if config.per_role else None,
        baseline=baseline,
    )
    rows = []
    for (_, i, dialogue, role), value in zip(members, found.value.tolist(), strict=True):
        if dialogue.reward is None:
            continue
        other = dialogue.advantage or (0.0, 0.0)
        dialogue.advantage = (value, other[1]) if role == 0 else (other[0], value)
        own = [view for view, of in zip(dialogue.views, dialogue.view_roles, strict=True) if of == role]
        rows += [view_row(view, config.train_kinds, value, i, role) for view in own]
    return rows, {
        "no_variance_share": found.no_variance / max(found.groups, 1),
        "unscored": float(sum(d.reward is None for _, d in dialogues)),
    }


def demonstration_rows(dialogue: ScriptedDialogue, tokenizer: Tokenizer, dialogue_id: int) -> list[Row]:
    """Both sides' views of a scripted dialogue, by the same transcript that self-play uses; each side imitates its own words."""
    first, second = dialogue.scenario.private_text
    transcript = Transcript(tokenizer.chat, (tokenizer.encode(first), tokenizer.encode(second)))
    end = min(tokenizer.stop_token_ids)
    question = tokenizer.encode(dialogue.final_prompt)
    for side, text, kind in dialogue.turns:
        final = kind == "final"
        transcript.ask(side, question if final else None)
        transcript.say(side, [*tokenizer.encode(text), end], None, FINAL if final else UTTERANCE, text)
    kinds = ("utterance", "final")
    return [view_row(view, kinds, 0.0, dialogue_id, role) for role, view in enumerate(transcript.views)]


def demonstration_batch(corpus: list[ScriptedDialogue], tokenizer: Tokenizer, n: int, seed: int) -> list[Row]:
    """Rows of `n` dialogues drawn from the corpus by `seed`."""
    chosen = random.Random(seed).sample(range(len(corpus)), min(n, len(corpus)))
    rows = [row for i in chosen for row in demonstration_rows(corpus[i], tokenizer, i)]
    return [row for row in rows if row.n_trained]
