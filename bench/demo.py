"""Append finished runs to bench/results/deal.csv: one row per run, warm start and trained side by side. Runs
told in English are rows of deal-english.csv, price-english.csv and so on.

python bench/demo.py runs/demo [RUN_DIR ...]
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.common import append_rows

MEASURES = ("agreement", "pareto", "joint_ratio", "nash_ratio")
PRICE = ("agreement", "efficiency", "right_walks", "wrong_deals", "share_buyer", "nash_ratio")
ENGLISH = ("failure_conflict", "failure_leftover", "failure_malformed")
PRICE_ENGLISH = ("failure_mismatch", "failure_malformed")


def main(paths: list[str]) -> int:
    rows: dict[str, list[dict[str, object]]] = {}
    for path in map(Path, paths):
        summary = json.loads((path / "summary.json").read_text())
        config = tomllib.loads((path / "config.toml").read_text())
        game, english = config["game"]["name"], config["game"]["telling"] == "english"
        measures, failures = (PRICE, PRICE_ENGLISH) if game == "price" else (MEASURES, ENGLISH)
        row: dict[str, object] = {"seed": summary["seed"], "dialogues": int(summary["trained"]["dialogues"])}
        for policy in ("warm_start", "trained"):
            keys = measures + failures * english
            row |= {f"{policy}_{key}": round(summary[policy][key], 4) for key in keys}
        row |= {
            "imitation_steps": config["imitation"]["steps"],
            "selfplay_steps": summary["steps"] - config["imitation"]["steps"],
            "threads": config["train"]["threads"] or "all",
            "train_seconds": round(summary["train_seconds"]),
            "peak_memory_mb": round(summary["peak_memory_bytes"] / 2**20),
            "parameters": summary["parameters"],
        }
        rows.setdefault(game + "-english" * english, []).append(row)
        print(row)
    if not rows:
        print(__doc__)
        return 2
    for name, of_game in rows.items():
        append_rows(name, of_game)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
