"""The rules between keys of [grpo]: which of them go together."""

from __future__ import annotations

from collections.abc import Iterator

from duologue.grpo.sections import GrpoSection

Rule = tuple[str, str, bool]  # a key, what is accepted for it, whether it is so


def learning_rules(g: GrpoSection, *, exact: bool, scores_before_end: bool) -> Iterator[Rule]:
    """All of them, whether they hold or not. `scores_before_end`: the game may have scores before its end."""
    once = "0 while rollout.exact = true, where the weight would be 1"
    yield "grpo.tis_cap", once, not (g.tis_cap and exact)
    yield "grpo.updates_per_rollout", "1 with grpo.tis_cap", not g.tis_cap or g.updates_per_rollout == 1
    betas = "a list of two numbers from 0 to below 1"
    yield "grpo.betas", betas, len(g.betas) == 2 and all(0 <= b < 1 for b in g.betas)
    kinds = "'utterance', 'final' or both, each once"
    yield "grpo.train_kinds", kinds, 0 < len(set(g.train_kinds)) == len(g.train_kinds)
    dual = f"0, or above 1 + clip_high = {1 + g.clip_high:g} for a loss other than cispo"
    outside = g.dual_clip > 1 + g.clip_high and g.loss != "cispo"
    yield "grpo.dual_clip", dual, not g.dual_clip or outside
    running = "true with grpo.advantage = 'running', which is per role"
    yield "grpo.per_role", running, g.per_role or g.advantage != "running"
    any_group = "0 with grpo.advantage = 'running', by which any group teaches"
    yield "grpo.resample", any_group, not g.resample or g.advantage != "running"
    whole = g.credit == "dialogue"
    no_steps = "'dialogue' with a game that has no score before its end"
    yield "grpo.credit", no_steps, whole or scores_before_end
    no_turns = "'dialogue' with grpo.advantage = 'running', which knows no turns"
    yield "grpo.credit", no_turns, whole or g.advantage != "running"
    one_ratio = "'dialogue' with grpo.loss = 'gspo', which has one ratio for all turns of a row"
    yield "grpo.credit", one_ratio, whole or g.loss != "gspo"
