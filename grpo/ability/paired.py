"""Two policies on the same prompts: what one does better or worse, with McNemar's test and an interval.

    paired(before, after, seed)     # [prompts, instructions], 1 followed, 0 not, NaN no such instruction

The interval holds 95 % of a percentile bootstrap over prompts, in which both policies are drawn alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from duologue.grpo.crossplay import means, resampled


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Shares of before and after; `value` is their difference, of which `low` to `high` is the interval.
    `gained` and `lost` count those that one of them alone follows, `p_value` is McNemar's, exact.
    """

    before: float
    after: float
    value: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float


def paired(before: np.ndarray, after: np.ndarray, seed: int) -> Paired:
    """Of arrays [prompts, instructions] with NaN in the same places; at least one prompt."""
    assert (np.isnan(before) == np.isnan(after)).all()
    weights = resampled(len(before), seed)
    (mean_before, drawn_before), (mean_after, drawn_after) = means(before, weights), means(after, weights)
    low, high = np.percentile(drawn_after - drawn_before, [2.5, 97.5])
    gained, lost = int((after > before).sum()), int((after < before).sum())
    return Paired(
        before=mean_before,
        after=mean_after,
        value=mean_after - mean_before,
        low=float(low),
        high=float(high),
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """How probable it is that pairs which differ are shared out at least as unevenly, were either way as
    likely: the exact two-sided test (McNemar 1947).
    """
    n, fewer = gained + lost, min(gained, lost)
    ways = tail = 1  # of choosing none of n; then of choosing k + 1
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, float(tail / 2 ** (n - 1))) if n else 1.0
