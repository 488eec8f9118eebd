"""Group-relative advantages on CUDA. A step has a few thousand members in any order: each program looks through all for its own."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

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
    mine,
    by_role,
    HAS_ROLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = start + tl.arange(0, BLOCK)
    role = tl.load(roles + at, at < N, 0) if HAS_ROLES else tl.zeros((BLOCK,), tl.int64)
    key = tl.where(by_role, role, tl.load(group_ids + at, at < N, 0) * R + role)
    member = (at < N) & (tl.load(scored + at, at < N, 0) != 0) & (key == mine)
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
    """Program s: segment s = group * R + role; with running baselines (METHOD 3) the last R programs: all members of a role."""
    s = tl.program_id(0).to(tl.int64)
    segments = tl.num_programs(0) - (R if METHOD == 3 else 0)
    by_role = s >= segments
    mine = tl.where(by_role, s - segments, s)
    low, high = float("inf"), -float("inf")
    for start in range(0, N, BLOCK):
        _, member, r = _members(
            rewards, group_ids, roles, scored, start, N, R, mine, by_role, HAS_ROLES, BLOCK
        )
        low = tl.minimum(low, tl.min(tl.where(member, r, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(member, r, -float("inf")), 0))
    count, total, square = 0, 0.0, 0.0
    for start in range(
        0, N, BLOCK
    ):  # from the lowest, so that equal rewards have exactly their own value as mean
        _, member, r = _members(
            rewards, group_ids, roles, scored, start, N, R, mine, by_role, HAS_ROLES, BLOCK
        )
        above = tl.where(member, r - low, 0.0)
        count, total, square = (
            count + tl.sum(member.to(tl.int32), 0),
            total + tl.sum(above, 0),
            square + tl.sum(above * above, 0),
        )
    n, others = tl.maximum(count, 1).to(tl.float32), tl.maximum(count - 1, 1).to(tl.float32)
    mean, scale = low + total / n, 1.0
    if METHOD == 0:
        scale = 1.0 / (tl.sqrt(tl.maximum(square - total * total / n, 0.0) / others) + 1e-4)
    if METHOD == 2:
        scale = n / others
    if by_role:
        kept = tl.load(baseline + mine)
        before = tl.where(kept != kept, mean.to(tl.float64), kept)
        tl.store(
            new_baseline + mine,
            tl.where(count > 0, decay * before + (1.0 - decay) * mean.to(tl.float64), kept),
        )
        mean = before.to(tl.float32)
    else:
        tl.store(counts + s, count.to(tl.int64))
        tl.store(flat + s, low == high)
        scale = tl.where(low == high, 0.0, scale)
    if by_role or METHOD < 3:
        for start in range(0, N, BLOCK):
            at, member, r = _members(
                rewards, group_ids, roles, scored, start, N, R, mine, by_role, HAS_ROLES, BLOCK
            )
            tl.store(value + at, (r - mean) * scale, member)


def launch(inputs: Sequence[Tensor | None], out: Sequence[Tensor], method: int, decay: float) -> None:
    """inputs: rewards, group_ids, roles, scored and baseline, contiguous; written: value, counts, flat and new_baseline."""
    rewards, group_ids, roles, scored, baseline = inputs
    value, counts, _, new_baseline = out
    value.zero_()
    programs = counts.numel() + (counts.shape[1] if method == 3 else 0)
    if programs:
        group_advantages[(programs,)](
            rewards,
            group_ids,
            group_ids if roles is None else roles,
            scored,
            new_baseline if baseline is None else baseline,
            *out,
            len(value),
            counts.shape[1],
            decay,
            METHOD=method,
            HAS_ROLES=roles is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )


def compile_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """As in gpu_sparse."""
    types = ("*fp32", "*i64", "*i64", "*i1", "*fp64", "*fp32", "*i64", "*i1", "*fp64", "i32", "i32", "fp32")
    signature = dict(zip(group_advantages.arg_names, types, strict=False))
    constants = [
        {"METHOD": m, "HAS_ROLES": roles, "BLOCK": BLOCK} for m, roles in product(range(4), (False, True))
    ]
    return [(group_advantages, signature, c, 4) for c in constants]
