"""What a step's dialogues look like: the figures by which a collapse is noticed (grpo/collapse.py)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import pairwise

from duologue.grpo.world import ALONE, World
from duologue.rollout.games.game import UNSCORED
from duologue.rollout.selfplay.dialogue import POLICY, Dialogue, Group

# Kinds of failure by form, not by what was negotiated: a statement that cannot be read, leaves something out,
# says two things or cannot hold, a game that a limit ended.
MALFORMED = ("malformed", "incomplete", "ambiguous", "out_of_range", "unfinished", "context_full")
NGRAM = 3  # tokens, of what is taken for an echo

Sums = dict[str, list[float]]  # figure -> its sum, and over how many


def talk_stats(
    groups: Sequence[Group], stop_token_ids: Collection[int], world: World = ALONE
) -> dict[str, float]:
    """Means over the groups of all ranks; what nothing is known of is left out.

    Of each side (0 and 1) that the policy has: `reward_*`, and `no_variance_*`, the share of groups in which
    its rewards are all equal. `win_share`: of the dialogues with itself that side 0 wins, a draw being half.
    `malformed`: dialogues that failed by their form or had an illegal move. Of the policy's own utterances:
    `turn_tokens`; `cut`, how many ended at the limit; `echo`, the share of their three-token sequences that
    the other side has just said; `distinct_2`, different pairs of tokens by all pairs of a group.
    """
    total: Sums = defaultdict(lambda: [0.0, 0.0])
    for of_group in world.gather([_of_group(group, stop_token_ids) for group in groups]):  # world
        for name, (part, count) in of_group.items():
            total[name][0] += part
            total[name][1] += count
    return {name: part / count for name, (part, count) in sorted(total.items()) if count}


def _of_group(group: Group, stop_token_ids: Collection[int]) -> Sums:
    sums: Sums = defaultdict(lambda: [0.0, 0.0])

    def add(name: str, value: float) -> None:
        sums[name][0] += value
        sums[name][1] += 1

    scored = [d for d in group.dialogues if d.reward is not None]
    for side in (0, 1):
        rewards = [d.reward[side] for d in scored if d.reward and d.players[side] == POLICY]
        for reward in rewards:
            add(f"reward_{side}", reward)
        if rewards:
            add(f"no_variance_{side}", float(min(rewards) == max(rewards)))
    pairs: list[tuple[int, int]] = []
    for dialogue in group.dialogues:
        if dialogue.outcome is not None and dialogue.outcome.failure != UNSCORED:
            first, second = dialogue.outcome.scores
            illegal = dialogue.outcome.metrics.get("illegal", 0.0) > 0
            add("malformed", float(illegal or dialogue.outcome.failure in MALFORMED))
            if dialogue.players == (POLICY, POLICY):
                add("win_share", 0.5 * ((first > second) + (first >= second)))
        for said, before in _utterances(dialogue):
            add("turn_tokens", float(len(said)))
            add("cut", float(not said or said[-1] not in stop_token_ids))
            pairs += pairwise(said)
            if (share := _echo(said, before)) is not None:
                add("echo", share)
    if pairs:
        add("distinct_2", len(set(pairs)) / len(pairs))
    return dict(sums)


def _utterances(dialogue: Dialogue) -> list[tuple[list[int], list[int]]]:
    """Those of the policy, each with the other side's before it."""
    latest: dict[int, list[int]] = {0: [], 1: []}
    found = []
    for turn in dialogue.turns:
        if turn.kind != "utterance":
            continue
        if dialogue.players[turn.role] == POLICY:
            found.append((turn.token_ids, latest[1 - turn.role]))
        latest[turn.role] = turn.token_ids
    return found


def _echo(said: Sequence[int], before: Sequence[int]) -> float | None:
    """None where one of both is too short to tell."""
    here, there = ([tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)] for ids in (said, before))
    if not here or not there:
        return None
    heard = set(there)
    return sum(ngram in heard for ngram in here) / len(here)
