"""Group-relative advantages by segment ids, for ragged groups with unscored members.

An unscored dialogue (its judge failed) is no zero: it takes no part in its group's statistics, its own advantage is
0, and the caller masks its tokens and counts it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

METHODS = ("std", "mean", "leave_one_out", "running")
EPS = 1e-4  # as in TRL: keeps the division finite; a group without variance has advantage 0 whatever this is


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """`value` [N] fp32. `no_variance` counts the groups whose scored rewards are all equal: they teach nothing."""

    value: Tensor
    no_variance: int
    groups: int


@dataclass(kw_only=True, slots=True)
class RunningBaseline:
    """An exponential average of the reward per role (SPIRAL, Liu et al. 2025, arXiv 2506.24119); saved with a run."""

    decay: float = 0.95
    means: dict[int, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "means": {str(role): mean for role, mean in self.means.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay = state["decay"]
        self.means = {int(role): mean for role, mean in state["means"].items()}


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    scored: Tensor,
    *,
    method: str = "std",
    roles: Tensor | None = None,
    baseline: RunningBaseline | None = None,
) -> Advantages:
    """Advantages of rewards [N] in groups group_ids [N] (ids 0 .. n - 1); scored [N] bool.

    std: (r - mean) / (std + 1e-4) with the unbiased std; mean: r - mean; leave_one_out: r - mean of the others
    (RLOO, Ahmadian et al. 2024, arXiv 2402.14740); running: r - the role's running mean before this batch, which is
    then updated. `roles` [N] given, a group is split by role.
    """
    if method not in METHODS:
        raise ValueError(f"grpo.advantage = {method!r}: accepted is one of {', '.join(METHODS)}")
    if roles is not None:
        _, group_ids = torch.unique(torch.stack((group_ids, roles)), dim=1, return_inverse=True)
    n_groups = int(group_ids.max()) + 1 if len(group_ids) else 0
    weight = scored.double()
    r = torch.where(scored, rewards.double(), 0.0)

    def over_group(x: Tensor) -> Tensor:
        return x.new_zeros(n_groups).index_add(0, group_ids, x)

    count = over_group(weight)
    mean = over_group(r * weight) / count.clamp(min=1)
    centred = torch.where(scored, r - mean[group_ids], 0.0)
    square = over_group(centred.square())
    flat = square <= 1e-12 * count.clamp(min=1)
    if method == "running":
        assert baseline is not None
        assert roles is not None, "a running baseline is kept per role"
        value = _running(r, roles, scored, baseline)
    elif method == "mean":
        value = centred
    elif method == "leave_one_out":
        value = centred * (count / (count - 1).clamp(min=1))[group_ids]
    else:
        std = (square / (count - 1).clamp(min=1)).sqrt()
        value = centred / (std + EPS)[group_ids]
    value = torch.where(scored & (~flat[group_ids] | (method == "running")), value, 0.0)
    return Advantages(value=value.float(), no_variance=int((flat & (count > 0)).sum()), groups=int((count > 0).sum()))


def _running(r: Tensor, roles: Tensor, scored: Tensor, baseline: RunningBaseline) -> Tensor:
    value = torch.zeros_like(r)
    for role in sorted(set(roles.tolist())):
        members = (roles == role) & scored
        if not bool(members.any()):
            continue
        batch_mean = float(r[members].mean())
        before = baseline.means.get(role, batch_mean)
        value[members] = r[members] - before
        baseline.means[role] = baseline.decay * before + (1 - baseline.decay) * batch_mean
    return value
