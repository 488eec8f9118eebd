"""Group-relative advantages: the contract of `ops.group_advantages`, and the `torch.library` op."""

from __future__ import annotations

import torch
from duologue.kernels import backend, reference
from torch import Tensor

METHODS = ("std", "mean", "leave_one_out", "running")


@torch.library.custom_op("duologue::group_advantages", mutates_args=())
def advantages_op(
    rewards: Tensor,
    group_ids: Tensor,
    scored: Tensor,
    roles: Tensor | None,
    baseline: Tensor | None,
    method: str,
    n_groups: int,
    n_roles: int,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op, device = "group_advantages", rewards.device.type
    if method not in METHODS:
        raise ValueError(f"{op}: method = {method!r}, accepted is one of {', '.join(METHODS)}")
    if rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: rewards is {rewards.dtype}, accepted is torch.float32 or torch.float64")
    backend.check(op, "rewards", rewards, (None,), None, device)
    for name, x, dtype in (
        ("group_ids", group_ids, torch.int64),
        ("scored", scored, torch.bool),
        ("roles", roles, torch.int64),
    ):
        if x is not None:
            backend.check(op, name, x, tuple(rewards.shape), dtype, device)
    if (baseline is None) == (method == "running"):
        raise ValueError(
            f"{op}: baseline is {'None' if baseline is None else 'given'}, accepted is one with method 'running' only"
        )
    if baseline is not None:
        backend.check(op, "baseline", baseline, (n_roles,), torch.float64, device)
    if not (rewards.is_cuda or backend.available()):
        return reference.group_advantages(
            rewards, group_ids, scored, roles, baseline, method, n_groups, n_roles, decay
        )
    inputs = [None if x is None else x.contiguous() for x in (rewards, group_ids, roles, scored, baseline)]
    out = _outputs(rewards, baseline, n_groups, n_roles)
    if rewards.is_cuda:
        from duologue.kernels.gpu import advantage as gpu_advantage

        gpu_advantage.launch(inputs, out, METHODS.index(method), decay)
    else:
        sizes = len(rewards), n_groups, n_roles, METHODS.index(method), decay, rewards.dtype == torch.float64
        if bad := backend.lib().group_advantages(*backend.pointers(*inputs, *out), *sizes):
            raise ValueError(f"{op}: {bad}")
    return out


def _outputs(
    rewards: Tensor, baseline: Tensor | None, n_groups: int, n_roles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new, size = rewards.new_empty, 0 if baseline is None else n_roles
    counts, flat = new((n_groups, n_roles), dtype=torch.int64), new((n_groups, n_roles), dtype=torch.bool)
    return new(rewards.shape, dtype=torch.float32), counts, flat, new(size, dtype=torch.float64)


@advantages_op.register_fake
def _(
    rewards: Tensor,
    group_ids: Tensor,
    scored: Tensor,
    roles: Tensor | None,
    baseline: Tensor | None,
    method: str,
    n_groups: int,
    n_roles: int,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(rewards, baseline, n_groups, n_roles)
