"""Group-relative advantages by segment ids, for ragged groups with unscored members.

An unscored dialogue (its judge failed) is no zero: it takes no part in its group's statistics, its own
advantage is 0, and the caller masks its tokens and counts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from duologue.kernels import ops
from duologue.kernels.advantage import METHODS
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """`value` [N] fp32. `no_variance` counts the groups whose scored rewards are all equal: they teach
    nothing.
    """

    value: Tensor
    no_variance: int
    groups: int


@dataclass(kw_only=True, slots=True)
class RunningBaseline:
    """An exponential average of the reward per role (SPIRAL, Liu et al. 2025, arXiv 2506.24119); saved with a
    run.
    """

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

    std: (r - mean) / (std + 1e-4) with the unbiased std; mean: r - mean; leave_one_out: r - mean of the
    others (RLOO, Ahmadian et al. 2024, arXiv 2402.14740); running: r - the role's running mean before this
    batch, which is then updated. `roles` [N] (0, 1, ..) given, a group is split by role.
    """
    if method not in METHODS:
        raise ValueError(f"grpo.advantage = {method!r}: accepted is one of {', '.join(METHODS)}")
    n_groups, n_roles = (int(x.max()) + 1 if x is not None and len(x) else 1 for x in (group_ids, roles))
    means = None
    if method == "running":
        assert baseline is not None
        assert roles is not None, "a running baseline is kept per role"
        means = torch.tensor(
            [baseline.means.get(role, math.nan) for role in range(n_roles)], dtype=torch.float64
        )
    value, counts, flat, after = ops.group_advantages(
        rewards,
        group_ids,
        scored,
        method=method,
        n_groups=n_groups,
        roles=roles,
        n_roles=n_roles,
        baseline=means,
        decay=baseline.decay if baseline is not None else 0.0,
    )
    if baseline is not None:
        baseline.means.update(
            {role: mean for role, mean in enumerate(after.tolist()) if not math.isnan(mean)}
        )
    return Advantages(value=value, no_variance=int(flat.sum()), groups=int((counts > 0).sum()))


def turn_advantages(
    returns: Sequence[Sequence[float]],
    group_ids: Tensor,
    scored: Tensor,
    *,
    method: str = "std",
    roles: Tensor | None = None,
    baseline: RunningBaseline | None = None,
) -> tuple[list[list[float]], Advantages]:
    """Advantages of N members with a value for each of their turns, at least one: turn k is compared with
    turn k of the others in its group. A member with fewer turns has the value of its last one there, so that
    members whose values are all alike have the advantages of `group_advantages`.

    Of what is returned beside them, a group has no variance where it has none at any turn.
    """
    most = max(map(len, returns), default=1)
    how: Any = {"method": method, "roles": roles, "baseline": baseline}
    by_turn = [
        group_advantages(torch.tensor([of[min(k, len(of) - 1)] for of in returns]), group_ids, scored, **how)
        for k in range(most)
    ]
    every = torch.stack([of_turn.value for of_turn in by_turn])  # [most, N]
    values = [of_member[: len(of)] for of_member, of in zip(every.T.tolist(), returns, strict=True)]
    if most == 1:
        return values, by_turn[0]
    cells = [*zip(group_ids.tolist(), [0] * len(returns) if roles is None else roles.tolist(), strict=True)]
    of_scored = {cell for cell, known in zip(cells, scored.tolist(), strict=True) if known}
    differ = {cell for cell, some in zip(cells, (every != 0).any(0).tolist(), strict=True) if some}
    counts = {"no_variance": len(of_scored - differ), "groups": len(of_scored)}
    return values, Advantages(value=every[0], **counts)
