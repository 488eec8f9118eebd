"""Idle share of several ranks, simulated from recorded dialogues: a fixed split against one queue of groups.

    python bench/ranks_model.py [RUN/dialogues.jsonl] [--ranks 8] [--json] [--save]

A group takes as long as it has sampled tokens, as on ranks whose decoding is bound by rates. "fixed": group
g goes to rank g % ranks. "queue": whoever is free takes the next one, in order. "longest first": the same
with the longest first, lengths known beforehand: the most that an expectation of them can give. Without a
file, the groups of bench/results/group_lengths.csv, recorded from self-play of the recipe deal.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import random
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.common import RESULTS, append_rows

COUNTS = (8, 16, 32, 64, 128)  # groups of a step
DRAWS = 200


def group_lengths(path: Path) -> list[int]:
    """Sampled tokens of each group, of a run's dialogues.jsonl or of a csv."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [int(row["tokens"]) for row in csv.DictReader(file)]
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lengths = []
    for _, group in groupby(records, lambda r: (r.get("step"), r["scenario"]["id"])):
        lengths.append(sum(len(turn["token_ids"]) for record in group for turn in record["turns"]))
    return lengths


def fixed(lengths: Sequence[int], ranks: int) -> list[int]:
    """How long each rank works."""
    return [sum(lengths[rank::ranks]) for rank in range(ranks)]


def queue(lengths: Sequence[int], ranks: int) -> list[int]:
    """Likewise, each group taken by the first rank that is free."""
    free = [0] * ranks
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length)
    return free


def idle(busy: Sequence[int]) -> float:
    """Share of all ranks' time until the last one ends."""
    return 1 - sum(busy) / (len(busy) * max(busy))


def simulate(lengths: Sequence[int], groups: int, ranks: int) -> dict[str, Any]:
    """Means over steps of `groups` that are drawn from the recorded ones."""
    draws = random.Random(0)
    sums = {"fixed": 0.0, "queue": 0.0, "longest_first": 0.0}
    for _ in range(DRAWS):
        step = draws.choices(lengths, k=groups)
        sums["fixed"] += idle(fixed(step, ranks))
        sums["queue"] += idle(queue(step, ranks))
        sums["longest_first"] += idle(queue(sorted(step, reverse=True), ranks))
    return {"ranks": ranks, "groups": groups, **{k: round(v / DRAWS, 4) for k, v in sums.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dialogues", type=Path, nargs="?", default=RESULTS / "group_lengths.csv")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--save", action="store_true", help="append to bench/results/ranks_model.csv")
    options = parser.parse_args()
    lengths = group_lengths(options.dialogues)
    rows = [simulate(lengths, groups, options.ranks) for groups in COUNTS]
    if options.json:
        print(json.dumps(rows))
    else:
        print("groups  idle: fixed   queue  longest first")
        for row in rows:
            shares = f"{row['fixed']:11.1%} {row['queue']:7.1%} {row['longest_first']:14.1%}"
            print(f"{row['groups']:6} {shares}")
    if options.save:
        append_rows("ranks_model", rows)


if __name__ == "__main__":
    main()
