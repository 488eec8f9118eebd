"""Group-relative advantages on CUDA. A step has a few thousand members in any order: each program looks through all for its own."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _members(rewards, group_ids, roles, scored, start, N, R, mine, by_role, HAS_ROLES: tl.constexpr, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    role = tl.load(roles + at, at < N, 0) if HAS_ROLES else tl.zeros((BLOCK,), tl.int64)
    key = tl.where(by_role, role, tl.load(group_ids + at, at < N, 0) * R + role)
    member = (at < N) & tl.load(scored + at, at < N, 0).to(tl.int1) & (key == mine)
    return at, member, tl.load(rewards + at, member, 0.0).to(tl.float32)


@triton.jit
def group_advantages(
    rewards, group_ids, roles, scored, baseline, value, counts, flat, new_baseline, N, R, decay,
    METHOD: tl.constexpr, HAS_ROLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program s: segment s = group * R + role; with running baselines (METHOD 3) the last R programs: all members of a role."""
    s = tl.program_id(0).to(tl.int64)
    segments = tl.num_programs(0) - (R if METHOD == 3 else 0)
    by_role = s >= segments
    mine = tl.where(by_role, s - segments, s)
    low, high, count = float("inf"), -float("inf"), 0
    for start in range(0, N, BLOCK):
        at, member, r = _members(rewards, group_ids, roles, scored, start, N, R, mine, by_role, HAS_ROLES, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(member, r, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(member, r, -float("inf")), 0))
        count += tl.sum(member.to(tl.int32), 0)
    total, square = 0.0, 0.0
    for start in range(0, N, BLOCK):
        at, member, r = _members(rewards, group_ids, roles, scored, start, N, R, mine, by_role, HAS_ROLES, BLOCK)
        total += tl.sum(tl.where(member, r - low, 0.0), 0)
    n = tl.maximum(count, 1).to(tl.float32)
    mean = low + total / n  # equal rewards have exactly their own value as mean
    for start in range(0, N, BLOCK):
        at, member, r = _members(rewards, group_ids, roles, scored, start, N, R, mine, by_role, HAS_ROLES, BLOCK)
        square += tl.sum(tl.where(member, (r - mean) * (r - mean), 0.0), 0)
    others = tl.maximum(n - 1.0, 1.0)
    scale = 1.0
    if METHOD == 0:
        scale = 1.0 / (tl.sqrt(square / others) + 1e-4)
    if METHOD == 2:
        scale = n / others
    if by_role:
        kept = tl.load(baseline + mine)
        before = tl.where(kept != kept, mean.to(tl.float64), kept)
        tl.store(new_baseline + mine, tl.where(count > 0, decay * before + (1.0 - decay) * mean.to(tl.float64), kept))
        mean = before.to(tl.float32)
    else:
        tl.store(counts + s, count.to(tl.int64))
        tl.store(flat + s, low == high)
        scale = tl.where(low == high, 0.0, scale)
    if by_role or METHOD < 3:
        for start in range(0, N, BLOCK):
            at, member, r = _members(rewards, group_ids, roles, scored, start, N, R, mine, by_role, HAS_ROLES, BLOCK)
            tl.store(value + at, (r - mean) * scale, member)


def launch(
    rewards: Tensor, group_ids: Tensor, roles: Tensor | None, scored: Tensor, baseline: Tensor | None,
    value: Tensor, counts: Tensor, flat: Tensor, new_baseline: Tensor, method: int, decay: float,
) -> None:  # fmt: skip
    """Writes the last four tensors but `method` and `decay`; the arguments are those of the op, contiguous."""
    value.zero_()
    R, given = counts.shape[1], [group_ids if roles is None else roles, scored, new_baseline if baseline is None else baseline]
    programs = counts.numel() + (R if method == 3 else 0)
    if programs:
        group_advantages[(programs,)](
            rewards, group_ids, *given, value, counts, flat, new_baseline, len(rewards), R, decay,
            METHOD=method, HAS_ROLES=roles is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def compile_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, types of its arguments, constants, warps), as in triton_sparse."""
    types = {"rewards": "*fp32", "scored": "*i1", "baseline": "*fp64", "value": "*fp32", "flat": "*i1", "new_baseline": "*fp64",
             "N": "i32", "R": "i32", "decay": "fp32"}  # fmt: skip
    names = group_advantages.arg_names[:12]
    signature = {name: types.get(name, "*i64") for name in names}
    return [
        (group_advantages, signature, {"METHOD": method, "HAS_ROLES": roles, "BLOCK": BLOCK}, 4)
        for method in range(4)
        for roles in (False, True)
    ]
