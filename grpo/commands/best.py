"""How a run fared in the small evaluations on its way: the report's curves of `eval`, and its best one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duologue.grpo.best import ITSELF
from duologue.grpo.commands.charts import Chart, chart, is_number
from duologue.grpo.partners import START

Record = dict[str, Any]
REWARDS = {"itself": "with itself", "start": "with its start", "opponent": "the start's"}


def charts(metrics: Sequence[Record]) -> list[Chart]:
    """The reward in the evaluations, over the steps that the policy had made."""
    points = []
    for row in metrics:
        for name, step in (("start_eval", row["step"]), ("eval", row["step"] + 1)):
            if row.get(name):
                points.append({"step": step, **_rewards(row[name])})
    drawn = chart("Reward in held-out evaluations", points, REWARDS)
    return [] if drawn is None else [drawn]


def _rewards(measures: Record) -> Record:
    payoff = measures.get(START, {})
    rewards = {"itself": measures[ITSELF].get("reward")}
    return {**rewards, "start": payoff.get("policy"), "opponent": payoff.get("opponent")}


def in_words(summary: Record) -> str:
    """Which checkpoint is the best, of a run's summary."""
    value = f"{summary['value']:.3f}" if is_number(summary.get("value")) else "unknown"
    return f"after step {summary['step']}, {summary['by']} {value}"
