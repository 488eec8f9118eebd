"""Dialogues per second of the whole step: two ranks with a core each against one rank with one core.

    python bench/scaling.py --pairs 3

Runs alternate, so that what else the machine does falls on both alike; a row holds the median of the pairs'
ratios and their spread. The first step of a run is left out. An entropy term has every row trained, for this
policy, which is near chance, earns nothing that advantages could be made of. Both take 64 dialogues at once:
with all of its 128 the rollout of a rank alone is a sixth slower, and two would seem better than twice as
fast.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from duologue.grpo.run_dir import read_lines

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.common import append_rows

GROUPS, GROUP_SIZE = 16, 8
SETTINGS = [
    "deal",
    "imitation.steps=1",  # which there must be, for its tokenizer
    "imitation.dialogues=200",
    "grpo.entropy_coef=0.001",
    "rollout.max_batch=64",
    "train.kl_every=0",
    "train.threads=1",
    "eval.dialogues=2",
    "eval.partners=[]",
    f"grpo.groups_per_step={GROUPS}",
    f"grpo.group_size={GROUP_SIZE}",
]


def rate(folder: Path, ranks: int, steps: int, cores: list[int]) -> float:
    """Dialogues per second."""
    run = [sys.executable, "-m", "duologue.grpo.cli", "train", *SETTINGS, f"train.steps={steps}"]
    subprocess.run(
        [*run, "--run-dir", str(folder), "--ranks", str(ranks)],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=1800,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:ranks]),
    )
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "selfplay"][1:]
    if not all(row["update_tokens_per_s"] for row in rows):
        raise SystemExit(f"{folder}: a step trained nothing, so its time is not that of a step")
    seconds = [row["seconds"] for row in rows]
    return GROUPS * GROUP_SIZE / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    cores, ratios, rates = sorted(os.sched_getaffinity(0)), [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(options.pairs):
            one = rate(Path(folder) / f"one-{pair}", 1, options.steps, cores)
            two = rate(Path(folder) / f"two-{pair}", 2, options.steps, cores)
            ratios.append(two / one)
            rates.append((one, two))
            print(f"1 rank {one:.1f}, 2 ranks {two:.1f} dialogues/s: {two / one:.2f}", file=sys.stderr)
    one, two = (statistics.median(column) for column in zip(*rates, strict=True))
    row = {"pairs": options.pairs, "one_rank_per_s": one, "two_ranks_per_s": two}
    row |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    append_rows("scaling", [row])


if __name__ == "__main__":
    main()
