"""Group-relative advantages: the contract of `ops.group_advantages`, the call of C++ and the `torch.library`
op. On a GPU the definition serves, which is vectorised: a step has a few hundred members.

Shapes: N members.
"""

from __future__ import annotations

from typing import Any

import torch
from duologue.kernels import backend
from torch import Tensor

METHODS = ("std", "mean", "leave_one_out", "running")
# advantage [N], scored members and whether their rewards are equal [n_groups, n_roles], new baseline
# [n_roles]
Advantages = tuple[Tensor, Tensor, Tensor, Tensor]


def check(
    rewards: Tensor,
    group_ids: Tensor,
    scored: Tensor,
    roles: Tensor | None,
    baseline: Tensor | None,
    method: str,
    n_roles: int,
) -> None:
    """Raise ValueError for an argument that does not fit, on any library."""
    op = "group_advantages"
    device = rewards.device.type
    if method not in METHODS:
        raise ValueError(f"{op}: method = {method!r}, accepted is one of {', '.join(METHODS)}")
    if rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: rewards is {rewards.dtype}, accepted is torch.float32 or torch.float64")
    backend.check(
        op,
        device,
        rewards=(rewards, (None,), None),
        group_ids=(group_ids, rewards.shape, torch.int64),
        scored=(scored, rewards.shape, torch.bool),
        roles=(roles, rewards.shape, torch.int64),
    )
    if (baseline is None) == (method == "running"):
        given = "None" if baseline is None else "given"
        raise ValueError(f"{op}: baseline is {given}, accepted is one with method 'running' only")
    backend.check(op, device, baseline=(baseline, (n_roles,), torch.float64))


def kernel(
    rewards: Tensor,
    group_ids: Tensor,
    scored: Tensor,
    roles: Tensor | None,
    baseline: Tensor | None,
    method: str,
    n_groups: int,
    n_roles: int,
    decay: float,
) -> Advantages:
    inputs = [None if x is None else x.contiguous() for x in (rewards, group_ids, roles, scored, baseline)]
    out = _outputs(rewards, baseline, n_groups, n_roles)
    sizes = len(rewards), n_groups, n_roles, METHODS.index(method), decay, False
    bad = backend.lib().group_advantages(*backend.pointers(*inputs, *out), *sizes)
    if bad:
        raise ValueError(f"group_advantages: {bad}")
    return out


def _outputs(rewards: Tensor, baseline: Tensor | None, n_groups: int, n_roles: int) -> Advantages:
    new = rewards.new_empty
    shape = (n_groups, n_roles)
    value = new(rewards.shape, dtype=torch.float32)
    counts = new(shape, dtype=torch.int64)
    flat = new(shape, dtype=torch.bool)
    return value, counts, flat, new(0 if baseline is None else n_roles, dtype=torch.float64)


kernel_op = backend.library_op("group_advantages", kernel)


@kernel_op.register_fake
def _(rewards: Tensor, *others: Any) -> Advantages:
    _, _, _, baseline, _, n_groups, n_roles, _ = others
    return _outputs(rewards, baseline, n_groups, n_roles)
