"""Advantages from the rewards of a batch: who is compared with whom, and what is subtracted.

One entry per (dialogue, role) row, `[N]`. A group is whatever shares a `group_id`: the dialogues of one scenario or,
for role-swapped pairs, of a scenario and its mirror image. Groups may be ragged. With `roles` given, each role of a
group is its own group.

    kind            advantage of row i                                     paper (arXiv)
    mean            r_i - mean of its group                                2503.20783 (Dr. GRPO)
    std             the same / (standard deviation of its group + 1e-4)    2402.03300 (GRPO; unbiased, 1e-4 as in TRL)
    leave_one_out   r_i - mean of the others of its group                  2402.14740 (RLOO)
    running         r_i - running mean of the rewards of its role          2506.24119 (SPIRAL)

A row that could not be scored counts nowhere and gets 0, and its tokens must not be trained: `Advantages.scored`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("std", "mean", "leave_one_out", "running")
STD_EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningBaseline:
    """Exponential mean of the rewards of each role. An update returns a new one; `dataclasses.asdict` serialises it.

    One update per batch, with the batch's mean, so that the order of rows has no effect. A role starts at the mean of
    its first batch.
    """

    decay: float = 0.95
    means: tuple[float | None, float | None] = (None, None)  # by role; without roles the first serves all

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"running baseline: decay = {self.decay!r}: accepted is a number in [0, 1)")

    def values(self, rewards: Tensor, roles: Tensor, scored: Tensor) -> tuple[Tensor, RunningBaseline]:
        """The baseline of each row [N], from before this batch wherever there is one, and the state after it."""
        baseline, means = torch.zeros_like(rewards), list(self.means)
        for role, old in enumerate(self.means):
            rows = (roles == role) & scored
            if not rows.any():
                continue
            batch_mean = float(rewards[rows].mean())
            start = batch_mean if old is None else old
            baseline[rows] = start
            means[role] = self.decay * start + (1 - self.decay) * batch_mean
        return baseline, RunningBaseline(decay=self.decay, means=(means[0], means[1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """Advantages of a batch and what became of its groups (per role where roles were given)."""

    values: Tensor  # [N] as rewards
    scored: Tensor  # [N] bool: rows whose tokens may be trained
    groups: int  # groups with a scored row
    flat_groups: int  # of these, without variance: nothing to learn from them except with the running baseline
    baseline: RunningBaseline | None  # the state after this batch, for "running"


def compute_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    kind: str,
    roles: Tensor | None = None,
    scored: Tensor | None = None,
    baseline: RunningBaseline | None = None,
) -> Advantages:
    """Advantages of rows [N]: `rewards` floating, `group_ids` and `roles` (0 or 1) integer, `scored` bool (None: all).

    The reward of an unscored row may be anything, NaN included. `baseline` is the state of `running`, given then only.
    """
    if kind not in KINDS:
        raise ValueError(f"advantage = {kind!r}: accepted is one of {', '.join(KINDS)}")
    assert (baseline is not None) == (kind == "running"), "a running baseline belongs to kind 'running'"
    scored = torch.ones_like(group_ids, dtype=torch.bool) if scored is None else scored
    reward = rewards.double().where(scored, 0.0)
    weight = scored.double()
    keys = group_ids[None] if roles is None else torch.stack([group_ids, roles.to(group_ids.dtype)])
    distinct, group = torch.unique(keys, dim=1, return_inverse=True)
    n = distinct.shape[1]

    def per_group(values: Tensor) -> Tensor:
        return values.new_zeros(n).index_add(0, group, values)

    count = per_group(weight)
    mean = per_group(reward) / count.clamp(min=1)
    highest = reward.new_full((n,), -torch.inf).scatter_reduce(0, group, reward.where(scored, -torch.inf), "amax")
    lowest = reward.new_full((n,), torch.inf).scatter_reduce(0, group, reward.where(scored, torch.inf), "amin")
    flat = highest <= lowest  # exact, where a computed deviation of equal rewards may round to something else than 0
    centred = (reward - mean[group]) * (weight * ~flat[group])
    if kind == "std":
        std = (per_group(centred.square()) / (count - 1).clamp(min=1)).sqrt()
        values = centred / (std + STD_EPSILON)[group]
    elif kind == "leave_one_out":
        values = centred * (count / (count - 1).clamp(min=1))[group]
    else:
        values = centred
    if baseline is not None:
        level, baseline = baseline.values(reward, torch.zeros_like(group) if roles is None else roles, scored)
        values = (reward - level) * weight
    present = count > 0
    return Advantages(
        values=values.to(rewards.dtype),
        scored=scored,
        groups=int(present.sum()),
        flat_groups=int((flat & present).sum()),
        baseline=baseline,
    )
