"""Group-relative advantages on CUDA. A step has a few thousand members in any order: each program looks
through all for its own."""

# mypy: disable-error-code="attr-defined"
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _members(
    rewards,
    group_ids,
    roles,
    scored,
    start,
    N,
    R,
    segment,
    by_role,
    HAS_ROLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = start + tl.arange(0, BLOCK)
    role = tl.load(roles + at, at < N, 0) if HAS_ROLES else tl.zeros((BLOCK,), tl.int64)
    of_member = tl.where(by_role, role, tl.load(group_ids + at, at < N, 0) * R + role)
    member = (at < N) & (tl.load(scored + at, at < N, 0) != 0) & (of_member == segment)
    return at, member, tl.load(rewards + at, member, 0.0).to(tl.float32)


@triton.jit
def group_advantages(
    rewards,
    group_ids,
    roles,
    scored,
    baseline,
    value,
    counts,
    flat,
    new_baseline,
    N,
    R,
    decay,
    METHOD: tl.constexpr,
    HAS_ROLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program s: the members of segment s = group * R + role; with running baselines (METHOD 3) the last R
    programs: those of a role."""
    s = tl.program_id(0).to(tl.int64)
    segments = tl.num_programs(0) - (R if METHOD == 3 else 0)
    by_role = s >= segments
    segment = tl.where(by_role, s - segments, s)
    low = float("inf")
    high = -float("inf")
    for start in range(0, N, BLOCK):
        _, member, r = _members(
            rewards, group_ids, roles, scored, start, N, R, segment, by_role, HAS_ROLES, BLOCK
        )
        low = tl.minimum(low, tl.min(tl.where(member, r, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(member, r, -float("inf")), 0))
    count = 0
    total = 0.0
    square = 0.0
    for start in range(0, N, BLOCK):
        _, member, r = _members(
            rewards, group_ids, roles, scored, start, N, R, segment, by_role, HAS_ROLES, BLOCK
        )
        above = tl.where(member, r - low, 0.0)  # so equal rewards have exactly their own value as mean
        count += tl.sum(member.to(tl.int32), 0)
        total += tl.sum(above, 0)
        square += tl.sum(above * above, 0)
    n = tl.maximum(count, 1).to(tl.float32)
    others = tl.maximum(count - 1, 1).to(tl.float32)
    mean = low + total / n
    scale = 1.0
    if METHOD == 0:
        scale = 1.0 / (tl.sqrt(tl.maximum(square - total * total / n, 0.0) / others) + 1e-4)
    if METHOD == 2:
        scale = n / others
    if by_role:
        old = tl.load(baseline + segment)
        before = tl.where(old != old, mean.to(tl.float64), old)  # NaN: none yet
        moved = decay * before + (1.0 - decay) * mean.to(tl.float64)
        tl.store(new_baseline + segment, tl.where(count > 0, moved, old))
        mean = before.to(tl.float32)
    else:
        tl.store(counts + s, count.to(tl.int64))
        tl.store(flat + s, low == high)
        scale = tl.where(low == high, 0.0, scale)
    if by_role or METHOD < 3:
        for start in range(0, N, BLOCK):
            at, member, r = _members(
                rewards, group_ids, roles, scored, start, N, R, segment, by_role, HAS_ROLES, BLOCK
            )
            tl.store(value + at, (r - mean) * scale, member)


def launch(inputs: Sequence[Tensor | None], out: Sequence[Tensor], method: int, decay: float) -> None:
    """inputs: rewards, group_ids, roles, scored and baseline, contiguous; written: value, counts, flat and
    new_baseline."""
    rewards, group_ids, roles, scored, baseline = inputs
    value, counts, _, new_baseline = out
    value.zero_()
    programs = counts.numel() + (counts.shape[1] if method == 3 else 0)
    members = (rewards, group_ids, group_ids if roles is None else roles, scored)
    before = new_baseline if baseline is None else baseline
    flags = {"METHOD": method, "HAS_ROLES": roles is not None, "BLOCK": BLOCK}
    if programs:
        group_advantages[(programs,)](
            *members, before, *out, len(value), counts.shape[1], decay, **flags, num_warps=4
        )
