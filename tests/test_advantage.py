"""grpo/advantage.py against brute force in plain Python, TRL's formula, and permutation of the rows."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest
import torch
from duologue.grpo.advantage import KINDS, RunningBaseline, compute_advantages
from torch import Tensor

GROUPED = [kind for kind in KINDS if kind != "running"]


def ragged(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards with ties, NaN where unscored; groups of 1 to 7 rows with ids that are neither dense nor sorted."""
    g = torch.Generator().manual_seed(seed)
    n = 31
    group_ids = torch.tensor([40, -3, 7, 11, 2**40])[torch.randint(0, 5, (n,), generator=g)]
    roles = torch.randint(0, 2, (n,), generator=g)
    scored = torch.rand(n, generator=g) > 0.2
    rewards = torch.randint(0, 4, (n,), generator=g).double() / 3
    rewards[group_ids == 7] = 0.1  # no variance
    rewards[~scored] = math.nan
    return rewards, group_ids, roles, scored


def brute_force(
    kind: str, rewards: list[float], keys: list[object], scored: list[bool]
) -> tuple[list[float], int, int]:
    values = []
    for i, key in enumerate(keys):
        others = [r for j, r in enumerate(rewards) if keys[j] == key and scored[j] and j != i]
        group = [*others, rewards[i]]
        if not scored[i] or not others:
            values.append(0.0)
        elif kind == "leave_one_out":
            values.append(rewards[i] - statistics.fmean(others))
        elif kind == "mean":
            values.append(rewards[i] - statistics.fmean(group))
        else:
            values.append((rewards[i] - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4))
    members = [{r for j, r in enumerate(rewards) if keys[j] == key and scored[j]} for key in set(keys)]
    return values, sum(bool(m) for m in members), sum(len(m) == 1 for m in members)


@pytest.mark.parametrize("per_role", [False, True])
@pytest.mark.parametrize("kind", GROUPED)
def test_equals_brute_force(kind: str, per_role: bool) -> None:
    for seed in range(8):
        rewards, group_ids, roles, scored = ragged(seed)
        result = compute_advantages(rewards, group_ids, kind=kind, roles=roles if per_role else None, scored=scored)
        keys = list(zip(group_ids.tolist(), roles.tolist(), strict=True)) if per_role else group_ids.tolist()
        values, groups, flat = brute_force(kind, rewards.tolist(), keys, scored.tolist())
        assert result.values.tolist() == pytest.approx(values, abs=1e-12)
        assert (result.groups, result.flat_groups) == (groups, flat)
        assert torch.equal(result.scored, scored)


@pytest.mark.parametrize("kind", KINDS)
def test_shuffling_rows_shuffles_advantages(kind: str) -> None:
    rewards, group_ids, roles, scored = ragged(3)
    baseline = RunningBaseline(means=(0.2, None)) if kind == "running" else None
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    whole = compute_advantages(rewards, group_ids, kind=kind, roles=roles, scored=scored, baseline=baseline)
    shuffled = compute_advantages(
        rewards[order], group_ids[order], kind=kind, roles=roles[order], scored=scored[order], baseline=baseline
    )
    torch.testing.assert_close(shuffled.values, whole.values[order], rtol=1e-12, atol=1e-14)
    if kind == "running":
        assert shuffled.baseline.means == pytest.approx(whole.baseline.means, rel=1e-12)


def test_std_equals_trl_on_full_groups() -> None:
    """TRL's `nanstd` on [groups, G] and its epsilon."""
    nanstd = pytest.importorskip("trl.trainer.utils", reason="trl is a development dependency").nanstd
    rewards = torch.rand(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards[1, 3] = math.nan
    expected = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    scored = ~rewards.isnan()
    ours = compute_advantages(
        rewards.flatten(), torch.arange(4).repeat_interleave(8), kind="std", scored=scored.flatten()
    )
    eps = torch.finfo(torch.float32).eps  # TRL takes Bessel's correction in fp32
    torch.testing.assert_close(ours.values, expected.nan_to_num(0).flatten(), rtol=eps, atol=0)


def test_equal_rewards_give_exactly_zero_and_are_counted() -> None:
    for kind in GROUPED:
        result = compute_advantages(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.long), kind=kind)
        assert result.values.tolist() == [0.0] * 7
        assert (result.groups, result.flat_groups) == (1, 1)


def test_roles_are_not_compared_with_each_other() -> None:
    """Side 1 is worth 10 more whatever it does: per role that is no advantage."""
    rewards, roles = torch.tensor([1.0, 11.0, 3.0, 13.0]), torch.tensor([0, 1, 0, 1])
    together = compute_advantages(rewards, torch.zeros(4, dtype=torch.long), kind="mean")
    apart = compute_advantages(rewards, torch.zeros(4, dtype=torch.long), kind="mean", roles=roles)
    assert together.values.tolist() == [-6, 4, -4, 6]
    assert apart.values.tolist() == [-1, -1, 1, 1]


def test_running_baseline_follows_each_role_and_survives_json() -> None:
    state = RunningBaseline(decay=0.75)
    ids, roles = torch.arange(4), torch.tensor([0, 0, 1, 1])
    first = compute_advantages(torch.tensor([1.0, 3.0, 10.0, 10.0]), ids, kind="running", roles=roles, baseline=state)
    assert first.values.tolist() == [-1, 1, 0, 0]
    assert first.baseline.means == (2.0, 10.0)
    restored = json.loads(json.dumps(dataclasses.asdict(first.baseline)))
    state = RunningBaseline(decay=restored["decay"], means=tuple(restored["means"]))
    scored = torch.tensor([True, True, False, False])
    second = compute_advantages(
        torch.tensor([6.0, 6.0, math.nan, math.nan]), ids, kind="running", roles=roles, scored=scored, baseline=state
    )
    assert second.values.tolist() == [4, 4, 0, 0]  # against the mean from before this batch
    assert second.baseline.means == (0.75 * 2 + 0.25 * 6, 10.0)
    assert state.means == (2.0, 10.0)


def test_running_baseline_without_roles_is_one() -> None:
    state = RunningBaseline(means=(5.0, None))
    result = compute_advantages(torch.tensor([6.0, 8.0]), torch.arange(2), kind="running", baseline=state)
    assert result.values.tolist() == [1, 3]
    assert result.baseline.means == (pytest.approx(0.95 * 5 + 0.05 * 7), None)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="advantage = 'gae': accepted is one of std, mean, leave_one_out, running"):
        compute_advantages(torch.zeros(1), torch.zeros(1, dtype=torch.long), kind="gae")
    with pytest.raises(ValueError, match=r"decay = 1.0: accepted is a number in \[0, 1\)"):
        RunningBaseline(decay=1.0)
