"""Groups that teach nothing are played again: only they, from other scenarios, within a budget, alike for any
number of ranks and after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.commands.report import gather
from duologue.grpo.config import load_config
from duologue.grpo.rounds import Numbered, play_again, round_metrics, teaches
from duologue.grpo.run_dir import read_lines
from duologue.grpo.sections import GrpoSection
from duologue.grpo.world import ALONE
from duologue.rollout.games.catalogue import GAMES
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.selfplay.dialogue import Dialogue, Group, View
from safetensors.torch import load_file
from thread_ranks import train_on_ranks
from tiny import LETTERS, VOLATILE, dialogues

DEAL = GAMES["deal"]()
RUN = [
    *LETTERS,
    "train.shares=2",
    "train.threads=1",
    "train.save_every=1",
    "grpo.group_size=2",  # of four moves in two turns: many groups have no variance
    "grpo.groups_per_step=16",
    "grpo.train_roles=first",
    "grpo.resample=3",
    "grpo.credit=turn",
    "grpo.learning_rate=1e-3",
    "dialogue.max_tokens_per_turn=10",
    "dialogue.temperature=0.05",  # the same is said often
    "eval.dialogues=2",
    "eval.partners=[]",
]


def group(scenario: Scenario, rewards: Sequence[float | None]) -> Group:
    """Of one trained token for each side of each dialogue."""
    dialogues = []
    for reward in rewards:
        view = View(token_ids=[1, 2], kinds=[0, 1], logprobs=[0.0, -1.0])
        view.supports.sizes += [0, 0]
        known = reward is not None
        dialogue = Dialogue(scenario=scenario, first_speaker=0, turns=[], views=(view, view))
        dialogue.outcome = Outcome(agreed=known, scores=(reward or 0.0, 0.5))
        dialogue.reward = (reward, 0.5) if known else None
        dialogues.append(dialogue)
    return Group(scenario=scenario, dialogues=dialogues)


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_only_groups_that_teach_nothing_are_played_again(rounds: int) -> None:
    rng = random.Random(rounds)
    config = GrpoSection(resample=rounds, group_size=3)
    asked: list[tuple[int, list[int]]] = []

    def played(scenarios: Sequence[Scenario], seed: int, numbers: Sequence[int]) -> Numbered:
        asked.append((seed, [*numbers]))
        rewards = [[rng.choice((0.0, 0.0, 0.0, 1.0, None)) for _ in range(3)] for _ in numbers]
        return {n: group(scenarios[n], of) for n, of in zip(numbers, rewards, strict=True)}

    scenarios = [DEAL.sample(rng, "train") for _ in range(40)]
    first = played(scenarios, 0, range(40))
    groups = dict(first)
    play_again(groups, scenarios, DEAL, config, 7, played)
    assert [*groups] == [*range(40)]
    known = {n: {d.reward[0] for d in g.dialogues if d.reward} for n, g in first.items()}
    flat = [n for n, values in known.items() if len(values) < 2]
    assert 4 < len(flat) < 36
    assert len({seed for seed, _ in asked}) == len(asked) <= 1 + rounds
    again = [numbers for _, numbers in asked[1:]]
    assert again[:1] == [flat][:rounds]
    for n, of_number in groups.items():
        history = [*of_number.dropped, of_number]
        assert history[0] is first[n] is of_number.drawn
        assert len(history) == 1 + sum(n in numbers for numbers in again)
        assert not any(teaches(other, config) or other.dropped for other in of_number.dropped)
        assert teaches(of_number, config) or of_number is first[n] or len(history) == 1 + rounds
        assert len({other.scenario.id for other in history}) == len(history)
    metrics = round_metrics([*groups.values()], config, ALONE)
    if not rounds:
        assert metrics == {}
        return
    assert metrics["resampled_groups"] == len(flat)
    assert metrics["resampled_dialogues"] == 3 * sum(map(len, again))
    dropped = [d for g in groups.values() for other in g.dropped for d in other.dialogues]
    assert metrics["dropped_unscored"] == sum(d.reward is None for d in dropped)
    assert metrics["flat_share_before"] == len(flat) / 40
    after = sum(not teaches(g, config) for g in groups.values()) / 40
    assert metrics["flat_share_after"] == after < len(flat) / 40


def test_a_group_without_a_token_of_a_trained_kind_teaches_nothing() -> None:
    of_rewards = group(DEAL.sample(random.Random(0), "train"), [0.0, 1.0])
    assert teaches(of_rewards, GrpoSection())
    assert not teaches(of_rewards, GrpoSection(train_kinds=("final",)))
    of_rewards.dialogues[0].players = of_rewards.dialogues[1].players = ("start", "policy")
    assert not teaches(of_rewards, GrpoSection())  # the other's alone differ


# ---- runs --------------------------------------------------------------------------------------------------


def run(path: Path, ranks: int, steps: int, *more: str) -> None:
    """From its start, or from where it is."""
    config = load_config("text-game", [*RUN, f"train.steps={steps}", *more])

    train_on_ranks(config, path, ranks)


def metrics(path: Path) -> list[dict[str, Any]]:
    rows = read_lines(path / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in {*VOLATILE, "idle_share"}} for row in rows]


def test_a_run_is_the_same_for_any_number_of_ranks_and_after_a_resume(tmp_path: Path) -> None:
    run(tmp_path / "1", 1, 2)
    run(tmp_path / "2", 2, 1)
    run(tmp_path / "2", 2, 2, "rollout.max_batch=3")
    rows, kept = metrics(tmp_path / "1"), dialogues(tmp_path / "1")
    assert rows == metrics(tmp_path / "2")
    assert kept == dialogues(tmp_path / "2")
    last = "checkpoints/step_000002/model.safetensors"
    a, b = load_file(tmp_path / "1" / last), load_file(tmp_path / "2" / last)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert sum(row["resampled_groups"] for row in rows) > 0
    for step, row in enumerate(rows):
        of_step = [d for d in kept if d["step"] == step]
        dropped = [d.get("dropped", False) for d in of_step]
        assert dropped == [False] * 32 + [True] * row["resampled_dialogues"]
        assert row["dialogues"] == 32
        assert not any(any(d["advantage"]) for d in of_step[32:])
        assert not any(any(d["turn_advantages"]) for d in of_step[32:])
        assert all(len(d["turn_advantages"]) == len(d["so_far"]) == 4 for d in of_step)
        assert any(len({*d["turn_advantages"]}) > 2 for d in of_step)
        tokens = [sum(len(t["logprobs"] or ()) for t in d["turns"]) for d in of_step]
        assert row["sampled_tokens"] == sum(tokens)
        assert row["flat_share_after"] <= row["flat_share_before"]
        assert row["no_variance_share"] < 1
    (drawn,) = [c for c in gather(tmp_path / "1")["charts"] if c.title == "Groups that teach nothing"]
    assert [series.label for series in drawn.series] == ["as drawn", "after grpo.resample"]
    with pytest.raises(ValueError, match=r"was started with grpo\.resample = 3, not 2, which can change"):
        run(tmp_path / "1", 1, 2, "grpo.resample=2")


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grpo\.resample = 2: accepted is 0 with grpo\.advantage"):
        load_config("deal", ["grpo.resample=2", "grpo.advantage=running"])
    with pytest.raises(ValueError, match=r"grpo\.resample = -1: accepted is 0 to 100"):
        load_config("deal", ["grpo.resample=-1"])
