"""Kills a run at random moments, resumes it each time, and compares what it comes to with a run that nobody
touched: weights, dialogues and metrics (times aside), bit for bit.

    python bench/chaos.py --kills 20
    python bench/chaos.py --kills 20 --ranks 2

Of several ranks a kill takes any one of them, or the process that started them and all of them. A line of
JSON for each kill, and one for the comparison; exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 600  # of one start
TIMES = ("seconds", "peak_memory_bytes", "idle_share", "rollout_tokens_per_s", "update_tokens_per_s")
RUN = [
    "text-game",
    f"game.name={Path(__file__).parent / 'letters.py'}",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.num_layers=2",
    "model.vocab_size=300",
    "model.max_position=400",
    "rollout.cache_tokens=16384",
    "opponent.kind=mix",
    "opponent.mix={self = 0.5, pool = 0.5}",
    "opponent.pool_every=2",
    "train.save_every=2",
    "train.kl_every=2",
    "train.threads=1",
    "train.tokens_per_microbatch=700",
    "grpo.group_size=4",
    "grpo.groups_per_step=5",
    "dialogue.max_tokens_per_turn=10",
    "eval.dialogues=8",
]


def command(run: Path, ranks: int, settings: Sequence[str]) -> list[str]:
    """Of a run that goes on where there is something to go on with."""
    start = [sys.executable, "-m", "duologue.grpo.cli", "train", *RUN, *settings, "--run-dir", str(run)]
    more = ["--ranks", str(ranks)] if ranks > 1 else []
    return [*start, *more, *(["--resume"] if (run / "config.toml").is_file() else [])]


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    return []


def finish(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        end_all(process)
        raise SystemExit(f"a start of the run did not end within {LIMIT_S} s: it hangs") from None


def end_all(process: subprocess.Popen[bytes]) -> None:
    """It and its ranks."""
    for pid in (process.pid, *children(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(LIMIT_S)


def started(run: Path, ranks: int, settings: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(run, ranks, settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=run.parent
    )


def reached(process: subprocess.Popen[bytes], run: Path, steps: int) -> bool:
    """Wait until the run has taken so many steps; True where it ended before."""
    path, began, seen, taken = run / "metrics.jsonl", time.monotonic(), -1, 0
    while process.poll() is None:
        size = path.stat().st_size if path.is_file() else 0
        taken += seen >= 0 and size > seen  # a resume cuts the file, each step makes it longer
        seen = size
        if taken >= steps and (steps or time.monotonic() - began > 4):
            return False
        if time.monotonic() - began > LIMIT_S:
            end_all(process)
            raise SystemExit(f"the run takes no step within {LIMIT_S} s: it hangs")
        time.sleep(0.01)
    return True


def kill(process: subprocess.Popen[bytes], rng: random.Random, ranks: int) -> str:
    """Kill a rank, or all, and wait until all are gone; what was killed."""
    of_ranks = children(process.pid) if ranks > 1 else []
    victim = rng.choice(["all", *range(len(of_ranks))]) if of_ranks else "all"
    if victim == "all":
        end_all(process)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(of_ranks[int(victim)], signal.SIGKILL)
        finish(process)
    ends = time.monotonic() + LIMIT_S
    while any(alive(pid) for pid in of_ranks):
        if time.monotonic() > ends:
            raise SystemExit("a rank lives on after the run has ended")
        time.sleep(0.05)
    return str(victim)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] != "Z"
    return False


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def result(run: Path) -> dict[str, str]:
    """Digests of what the run came to."""
    metrics = [{k: v for k, v in row.items() if k not in TIMES} for row in lines(run / "metrics.jsonl")]
    last = max((run / "checkpoints").glob("step_*"))
    weights = {
        str(f.name): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(last.glob("*.safetensors"))
    }
    facts = {"metrics": metrics, "dialogues": lines(run / "dialogues.jsonl"), "weights": weights}
    return {k: hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest() for k, v in facts.items()}


def step_of(run: Path) -> int:
    found = sorted((run / "checkpoints").glob("step_*"))
    return int(found[-1].name.removeprefix("step_")) if found else -1


def chaos(folder: Path, kills: int, ranks: int, seed: int, steps: int, more: Sequence[str] = ()) -> bool:
    """Whether the run that was killed came to the same."""
    settings = [*more, f"train.steps={steps}"]
    rng, began, each = random.Random(seed), time.monotonic(), steps // max(kills, 1)
    whole = folder / "whole"
    if code := finish(started(whole, ranks, settings)):
        raise SystemExit(f"the run ends with {code} even when nobody kills it")
    killed, number, done = folder / "killed", 0, False
    while number < kills:
        if done:  # it came to its end before all kills were made: once more from nothing
            same(whole, killed)
            shutil.rmtree(killed)
            done = False
        process = started(killed, ranks, settings)
        to_come = rng.randint(0, 2 * each)
        if reached(process, killed, to_come):
            done = True
            continue
        time.sleep(rng.uniform(0, 0.4))
        number, at = number + 1, time.monotonic()
        row = {"kill": number, "after_steps": to_come, "victim": kill(process, rng, ranks)}
        row |= {"gone_after_s": round(time.monotonic() - at, 2), "checkpoint": step_of(killed)}
        print(json.dumps(row), flush=True)
    if code := finish(started(killed, ranks, settings)):
        raise SystemExit(f"the last resume ends with {code}")
    return same(whole, killed, kills=kills, ranks=ranks, seed=seed, seconds=round(time.monotonic() - began))


def same(whole: Path, killed: Path, **facts: int) -> bool:
    a, b = result(whole), result(killed)
    differ = [name for name in a if a[name] != b[name]]
    print(json.dumps({**facts, "differ": differ, "weights": b["weights"][:16]}), flush=True)
    if differ:
        raise SystemExit(f"after the kills {', '.join(differ)} of {killed} differ from {whole}")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of self-play")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: nowhere)")
    options, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        where = options.folder or Path(folder)
        chaos(where, options.kills, options.ranks, options.seed, options.steps, settings)


if __name__ == "__main__":
    main()
