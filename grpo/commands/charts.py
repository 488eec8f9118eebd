"""Small line charts as geometry: what report.html draws as inline SVG. Plain numbers in, coordinates and
labels out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 20  # margins around the plotting area
MOST_POINTS = 160  # of a line; longer ones are averaged in equal buckets

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    label: str
    raw: str  # SVG path through the values
    smooth: str  # SVG path through their running mean; "" when there are few
    last: str  # the line's end, as text


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    title: str
    series: list[Series]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    strips: list[tuple[float, float, str]]  # (x, width, what the pointer is shown there)


def chart(
    title: str, rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str], percent: bool = False
) -> Chart | None:
    """Metrics over `step`; `keys` maps metric to label. None when no row has a value of any of them."""
    lines = {}
    for key, label in keys.items():
        if points := [(row["step"], row[key]) for row in rows if is_number(row.get(key))]:
            lines[label] = _thin(points)
    if not lines:
        return None
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    left, right = min(xs), max(xs) + (min(xs) == max(xs))
    low, high = _span(min(ys), max(ys))
    flat = ys[:1] if min(ys) == max(ys) else []

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)

    series = []
    for label, points in lines.items():
        mean = _running_mean(points)
        smooth = _path(map(place, mean)) if len(points) >= 12 else ""
        last = _exact(mean[-1][1], percent)
        series.append(Series(label=label, raw=_path(map(place, points)), smooth=smooth, last=last))
    return Chart(
        title=title,
        series=series,
        x_ticks=[(place((x, low))[0], f"{x:,.0f}") for x in ticks(left, right, 4) if x == int(x)],
        y_ticks=[(place((left, y))[1], short(y, percent)) for y in flat or ticks(low, high, 4)],
        strips=_strips(lines, place, percent),
    )


def is_number(value: Any) -> bool:
    """One that can be drawn: a null of a file is none."""
    return isinstance(value, int | float) and math.isfinite(value)


def ticks(low: float, high: float, n: int) -> list[float]:
    """About `n` round values from low to high."""
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float, percent: bool = False) -> str:
    """A number as an axis shows it."""
    if percent:
        return f"{value:.0%}" if abs(value) >= 0.1 or value == 0 else f"{value:.1%}"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _exact(value: float, percent: bool) -> str:
    if percent:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _thin(points: list[Point]) -> list[Point]:
    size = math.ceil(len(points) / MOST_POINTS)
    buckets = (points[i : i + size] for i in range(0, len(points), size))
    return [(fmean(x for x, _ in bucket), fmean(y for _, y in bucket)) for bucket in buckets]


def _span(low: float, high: float) -> Point:
    if low == high:
        return low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    margin = (high - low) * 0.06
    return (low if low == 0 else low - margin), high + margin


def _running_mean(points: list[Point]) -> list[Point]:
    """Centred, over a tenth of the line or so; shorter at the ends."""
    half = len(points) // 20
    ys = [y for _, y in points]
    return [(x, fmean(ys[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def _path(points: Iterable[Point]) -> str:
    places = [f"{x:.1f},{y:.1f}" for x, y in points]
    return "M" + "L".join(places if len(places) > 1 else 2 * places)  # with round caps one point is a dot


def _strips(lines: Mapping[str, list[Point]], place: Any, percent: bool) -> list[tuple[float, float, str]]:
    at: dict[float, list[str]] = {}
    for label, points in lines.items():
        for x, y in points:
            at.setdefault(x, []).append(f"{label} {_exact(y, percent)}")
    xs = sorted(at)
    spots = [place((x, 0.0))[0] for x in xs]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(spots)), WIDTH - RIGHT]
    return [
        (edges[i], edges[i + 1] - edges[i], f"step {x:,.0f}: " + ", ".join(at[x])) for i, x in enumerate(xs)
    ]
