"""grpo/advantage.py against brute force in plain Python, TRL's formula, and permutation of the rows."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from duologue.grpo.advantage import METHODS, RunningBaseline, group_advantages
from torch import Tensor

GROUPED = [method for method in METHODS if method != "running"]
EPS = torch.finfo(torch.float32).eps


def ragged(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards with ties, NaN where unscored; groups of 0 to 8 rows in any order, one of them without
    variance.
    """
    g = torch.Generator().manual_seed(seed)
    n = 31
    group_ids = torch.randint(0, 6, (n,), generator=g)
    roles = torch.randint(0, 2, (n,), generator=g)
    scored = torch.rand(n, generator=g) > 0.2
    rewards = torch.randint(0, 4, (n,), generator=g).double() / 3
    rewards[group_ids == 2] = 0.1
    rewards[~scored] = math.nan
    return rewards, group_ids, scored, roles


def brute_force(
    method: str, rewards: list[float], keys: list[object], scored: list[bool]
) -> tuple[list[float], int, int]:
    """(advantages, groups with a scored row, of these without variance)."""
    values = []
    for i, key in enumerate(keys):
        others = [r for j, r in enumerate(rewards) if keys[j] == key and scored[j] and j != i]
        group = [*others, rewards[i]]
        if not scored[i] or not others:
            values.append(0.0)
        elif method == "leave_one_out":
            values.append(rewards[i] - statistics.fmean(others))
        elif method == "mean":
            values.append(rewards[i] - statistics.fmean(group))
        else:
            values.append((rewards[i] - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4))
    members = [{r for j, r in enumerate(rewards) if keys[j] == key and scored[j]} for key in set(keys)]
    return values, sum(bool(m) for m in members), sum(len(m) == 1 for m in members)


@pytest.mark.parametrize("per_role", [False, True])
@pytest.mark.parametrize("method", GROUPED)
def test_equals_brute_force(method: str, per_role: bool) -> None:
    for seed in range(8):
        rewards, group_ids, scored, roles = ragged(seed)
        result = group_advantages(
            rewards, group_ids, scored, method=method, roles=roles if per_role else None
        )
        keys = list(zip(group_ids.tolist(), roles.tolist(), strict=True)) if per_role else group_ids.tolist()
        values, groups, flat = brute_force(method, rewards.tolist(), keys, scored.tolist())
        assert result.value.tolist() == pytest.approx(values, rel=EPS, abs=1e-12)
        assert (result.groups, result.no_variance) == (groups, flat)


@pytest.mark.parametrize("method", METHODS)
def test_shuffling_rows_shuffles_advantages(method: str) -> None:
    rewards, group_ids, scored, roles = ragged(3)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    baselines = RunningBaseline(means={0: 0.2}), RunningBaseline(means={0: 0.2})
    whole = group_advantages(rewards, group_ids, scored, method=method, roles=roles, baseline=baselines[0])
    shuffled = group_advantages(
        rewards[order],
        group_ids[order],
        scored[order],
        method=method,
        roles=roles[order],
        baseline=baselines[1],
    )
    torch.testing.assert_close(shuffled.value, whole.value[order], rtol=2 * EPS, atol=1e-12)
    assert baselines[0].means == pytest.approx(baselines[1].means, rel=1e-12)


def test_std_equals_trl_on_full_groups() -> None:
    """TRL's `nanstd` on [groups, G] and its epsilon."""
    nanstd = pytest.importorskip("trl.trainer.utils", reason="trl is a development dependency").nanstd
    rewards = torch.rand(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards[1, 3] = math.nan
    expected = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    scored = ~rewards.isnan().flatten()
    ours = group_advantages(rewards.flatten(), torch.arange(4).repeat_interleave(8), scored)
    torch.testing.assert_close(ours.value.double(), expected.nan_to_num(0).flatten(), rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("method", GROUPED)
def test_equal_rewards_give_exactly_zero_and_are_counted(method: str) -> None:
    for reward in (0.1, 1e4 / 3):
        rewards = torch.full((7,), reward, dtype=torch.float64)
        result = group_advantages(
            rewards, torch.zeros(7, dtype=torch.long), torch.ones(7, dtype=torch.bool), method=method
        )
        assert result.value.tolist() == [0.0] * 7
        assert (result.groups, result.no_variance) == (1, 1)


def test_roles_are_not_compared_with_each_other() -> None:
    """Side 1 is worth 10 more whatever it does: per role that is no advantage."""
    rewards, roles = torch.tensor([1.0, 11.0, 3.0, 13.0]), torch.tensor([0, 1, 0, 1])
    group, scored = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    assert group_advantages(rewards, group, scored, method="mean").value.tolist() == [-6, 4, -4, 6]
    assert group_advantages(rewards, group, scored, method="mean", roles=roles).value.tolist() == [
        -1,
        -1,
        1,
        1,
    ]


def test_running_baseline_follows_each_role_and_survives_json() -> None:
    state = RunningBaseline(decay=0.75)
    ids, roles, scored = (
        torch.zeros(4, dtype=torch.long),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([True] * 4),
    )
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0])
    first = group_advantages(rewards, ids, scored, method="running", roles=roles, baseline=state)
    assert first.value.tolist() == [-1, 1, 0, 0]
    assert state.means == {0: 2.0, 1: 10.0}
    restored = RunningBaseline()
    restored.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert restored == state
    rewards, scored = torch.tensor([6.0, 6.0, math.nan, math.nan]), torch.tensor([True, True, False, False])
    second = group_advantages(rewards, ids, scored, method="running", roles=roles, baseline=restored)
    assert second.value.tolist() == [
        4,
        4,
        0,
        0,
    ]  # against the mean from before this batch; no variance is no obstacle
    assert restored.means == {0: 0.75 * 2 + 0.25 * 6, 1: 10.0}


def test_an_empty_batch_and_a_wrong_method() -> None:
    nothing = torch.zeros(0)
    result = group_advantages(nothing, nothing.long(), nothing.bool())
    assert (result.value.tolist(), result.groups, result.no_variance) == ([], 0, 0)
    with pytest.raises(
        ValueError, match=r"grpo\.advantage = 'gae': accepted is one of std, mean, leave_one_out, running"
    ):
        group_advantages(nothing, nothing.long(), nothing.bool(), method="gae")
