"""A long run of a tiny policy: does anything grow? Resident memory, open files and threads over the steps,
and the engine's pages that are in use after each, of which there should be none.

    python -m bench.soak    # 2,000 steps; a row of figures every 100, a JSON line last
    python -m bench.soak --steps 200 --save
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.grpo.config import load_config
from duologue.grpo.console import Progress
from duologue.grpo.run_dir import RunDir
from duologue.grpo.trainer import Trainer

from bench.common import append_rows
from bench.models import TINY

SETTINGS = [  # opponents, evaluations, saves: whatever could keep something
    f"game.name={Path(__file__).parent / 'letters.py'}",
    *TINY,
    "rollout.cache_tokens=4096",
    "grpo.group_size=2",
    "grpo.groups_per_step=2",
    "dialogue.max_tokens_per_turn=6",
    "opponent.kind=mix",
    "opponent.mix={self = 0.5, pool = 0.5}",
    "opponent.pool_size=2",
    "train.save_every=50",
    "eval.dialogues=2",
    "eval.partners=[]",
    "eval.every=100",
    "eval.every_dialogues=2",
    "watch.idle=0",
]


class Figures(Progress):
    """Takes them as the trainer says that a step is done."""

    def __init__(self, every: int) -> None:
        super().__init__(quiet=True)
        self.every = every
        self.trainer: Trainer | None = None
        self.rows: list[dict[str, float]] = []
        self.most_pages = 0

    def update(self, step: int, metrics: Any) -> None:
        assert self.trainer is not None
        used = [engine.pool.n_pages - engine.pool.n_free for engine in self.trainer.opponents.engines]
        self.most_pages = max(self.most_pages, *used)
        if step % self.every == 0:
            process = psutil.Process()
            row = {
                "step": step,
                "rss_mib": process.memory_info().rss / 2**20,
                "open_files": process.num_fds(),
                "threads": process.num_threads(),
                "pages_in_use": self.most_pages,
            }
            self.rows.append(row)
            cells = "  ".join(f"{name} {value:,.1f}" for name, value in row.items())
            print(cells, flush=True)


def soak(steps: int, every: int) -> list[dict[str, float]]:
    """The figures every so many steps of a run of `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("text-game", [*SETTINGS, f"train.steps={steps}"])
        figures = Figures(every)
        run = RunDir.create(Path(folder) / "run", config.to_toml())
        figures.trainer = Trainer(config, run, figures, threading.Event())
        figures.trainer.run()
        figures.trainer.arena.speakers.close()
        run.close()
    return figures.rows


def growth(rows: list[dict[str, float]], name: str) -> float:
    """Of the last tenth over the second, whose caches are warm."""
    n = max(len(rows) // 10, 1)
    early, late = rows[n : 2 * n] or rows[:1], rows[-n:]
    return sum(row[name] for row in late) / len(late) - sum(row[name] for row in early) / len(early)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="steps from one row of figures to the next")
    parser.add_argument("--save", action="store_true", help="append a row to results/soak.csv")
    options = parser.parse_args()
    began = time.monotonic()
    rows = soak(options.steps, options.every)
    result = {
        "steps": options.steps,
        "seconds": round(time.monotonic() - began),
        "rss_mib": round(rows[-1]["rss_mib"], 1),
        **{f"{name}_growth": round(growth(rows, name), 2) for name in ("rss_mib", "open_files", "threads")},
        "most_pages_in_use": int(rows[-1]["pages_in_use"]),
    }
    if options.save:
        append_rows("soak", [result])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
