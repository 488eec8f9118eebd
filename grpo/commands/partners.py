"""How a run fared with each of its partners in training: the report's table and curves of `partners`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duologue.grpo.commands.charts import Chart, chart, is_number
from duologue.grpo.console import formatted

Record = dict[str, Any]
LATEST = 10  # steps that the table is made of, or the last tenth of the run where that is more
COLUMNS = {  # of a payoff: heading, format
    "dialogues": ("dialogues", "{:.0f}"),
    "agreement": ("agreement", "{:.1%}"),
    "policy": ("reward", "{:.3f}"),
    "opponent": ("partner's reward", "{:.3f}"),
    "policy_points": ("points", "{:.2f}"),
    "opponent_points": ("partner's points", "{:.2f}"),
    "share": ("share of the points", "{:.1%}"),
    "elo": ("Elo", "{:.0f}"),
}
CURVES = {"policy": ("Reward by partner", False), "agreement": ("Agreement by partner", True)}


def table(metrics: Sequence[Record]) -> Record:
    """Of the latest steps: a row per partner, and per character where there are several."""
    played = [row for row in metrics if row.get("partners")]
    latest = played[-max(LATEST, len(played) // 10) :]
    rows = _means([row["partners"] for row in latest])
    characters = _means([_characters(row["payoff"]) for row in latest])
    if "scripted" in rows:
        rows |= characters
    ratings: dict[str, float] = {}  # each the latest, which need not be of the last step
    for row in latest:
        ratings |= row["elo"]
    return {
        "steps": len(latest),
        "headings": [heading for heading, _ in COLUMNS.values()],
        "rows": [(name, _cells({**row, "elo": ratings.get(name)})) for name, row in sorted(rows.items())],
    }


def charts(metrics: Sequence[Record]) -> list[Chart]:
    """What the policy got with each partner over the steps, where there are several."""
    played = [row for row in metrics if row.get("partners")]
    names = sorted({name for row in played for name in row["partners"]})
    drawn = []
    for key, (title, percent) in CURVES.items() if len(names) > 1 else ():
        rows = [
            {"step": row["step"], **{name: of[key] for name, of in row["partners"].items()}} for row in played
        ]
        drawn.append(chart(title, rows, {name: name for name in names}, percent))
    return [figure for figure in drawn if figure is not None]


def _characters(payoff: Mapping[str, Record]) -> dict[str, Record]:
    return {name: row for name, row in payoff.items() if name.startswith("scripted:")}


def _means(tables: Sequence[Mapping[str, Record]]) -> dict[str, Record]:
    """Over the dialogues of all tables."""
    means: dict[str, Record] = {}
    for name in {name for table in tables for name in table}:
        rows = [table[name] for table in tables if name in table]
        total = sum(row["dialogues"] for row in rows)
        keys = [key for key in rows[0] if key in COLUMNS and key != "dialogues"]
        means[name] = {key: _mean(rows, key, total) for key in keys} | {"dialogues": total}
        points, other = means[name]["policy_points"], means[name]["opponent_points"]
        if is_number(points) and is_number(other) and points + other > 0:
            means[name]["share"] = points / (points + other)
    return means


def _mean(rows: Sequence[Record], key: str, total: float) -> float | None:
    if not all(is_number(row[key]) for row in rows):
        return None
    mean: float = sum(row["dialogues"] * row[key] for row in rows) / total
    return mean


def _cells(row: Record) -> list[str]:
    return [formatted(form, row.get(key)) for key, (_, form) in COLUMNS.items()]
