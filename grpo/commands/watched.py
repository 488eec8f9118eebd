"""What a run saw of itself: the report's curves of `eval` and `watch`, its best checkpoint, its alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duologue.grpo.best import ITSELF
from duologue.grpo.commands.charts import Chart, chart, is_number
from duologue.grpo.partners import START

Record = dict[str, Any]
REWARDS = {"itself": "with itself", "start": "with its start", "opponent": "the start's"}
# title, figure of `watch` -> label, whether a share
WATCHED: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Reward by side", {"reward_0": "side 1", "reward_1": "side 2"}, False),
    ("Tokens of a turn", {"turn_tokens": "mean"}, False),
    ("Words", {"distinct_2": "different pairs of tokens", "echo": "echo of the other side"}, True),
    ("Form", {"malformed": "malformed dialogues", "cut": "turns cut at the limit"}, True),
)


def charts(metrics: Sequence[Record]) -> list[Chart]:
    """The reward in the evaluations, over the steps that the policy had made; then what steps looked like."""
    points = []
    for row in metrics:
        for name, step in (("start_eval", row["step"]), ("eval", row["step"] + 1)):
            if row.get(name):
                points.append({"step": step, **_rewards(row[name])})
    drawn = [chart("Reward in held-out evaluations", points, REWARDS)]
    rows = [{"step": row["step"], **row["watch"]} for row in metrics if row.get("watch")]
    drawn += [chart(title, rows, labels, percent) for title, labels, percent in WATCHED]
    return [figure for figure in drawn if figure is not None]


def _rewards(measures: Record) -> Record:
    payoff = measures.get(START, {})
    rewards = {"itself": measures[ITSELF].get("reward")}
    return {**rewards, "start": payoff.get("policy"), "opponent": payoff.get("opponent")}


def facts(metrics: Sequence[Mapping[str, Any]], summary: Record) -> list[tuple[str, str]]:
    """The best checkpoint, the alarms in the order in which they were first heard, where the run went back
    and why it ended early.
    """
    found = []
    if best := summary.get("best"):
        value = f"{best['value']:.3f}" if is_number(best.get("value")) else "unknown"
        found.append(("best checkpoint", f"after step {best['step']}, {best['by']} {value}"))
    heard: set[str] = set()
    for row in metrics:
        watch = row.get("watch", {})
        for rule, why in watch.get("alarms", {}).items():
            if rule not in heard:
                found.append((f"warned after step {row['step'] + 1}", f"{rule}: {why}"))
        heard |= watch.get("alarms", {}).keys()
        if rollback := watch.get("rollback"):
            found.append(
                (f"went back after step {rollback['step']}", f"to {rollback['to']}: {rollback['why']}")
            )
    if summary.get("stopped"):
        found.append(("ended early", summary["stopped"]))
    return found
