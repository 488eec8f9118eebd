"""Kills a run again and again, resumes it each time, and compares what it comes to with a run that nobody
touched: weights, dialogues and metrics (times aside), bit for bit.

    python bench/chaos.py --kills 20
    python bench/chaos.py --kills 20 --ranks 2
    python bench/chaos.py --kills 10 --judged

A kill is aimed at a phase of a step (`PHASES`, while a checkpoint is written among them) or falls at any
moment. Of several ranks it takes one, or all. The processes are forked from this one, which has imported
everything and calls the command line in them; every fifth kill is of a command line of its own instead, with
the process that starts the ranks (not with --forked). A line of JSON for each kill, and one for the
comparison; exit code 1 where anything differs.
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
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from duologue.grpo import plan, run_dir, steps, trainer  # noqa: F401 - all is imported before a fork
from duologue.grpo.cli import main as duologue
from duologue.grpo.commands import players, report  # noqa: F401
from duologue.grpo.distributed import launch  # noqa: F401
from duologue.grpo.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.chaos_judge import judged_run
from bench.common import append_rows

LIMIT_S = 600  # of one start
TIMES = ("seconds", "peak_memory_bytes", "idle_share", "rollout_tokens_per_s", "update_tokens_per_s")
COSTS = "judge_"  # what was asked before a kill is not asked again
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
    "eval.partners=[]",
]
ANY = "any"
PHASES = ("rollout", "update", "reduction", "gathering", "lines", "saving", "verifying")
JUDGED = (*PHASES, "judging")


@dataclass(frozen=True)
class Kill:
    """In the first `phase` that comes when a start has taken `after` steps, `delay` seconds into it; of the
    rank `victim`, or of all.
    """

    phase: str
    after: int
    delay: float
    victim: int | None = None


# ---- in the process that is killed -------------------------------------------------------------------------


def aim(kill: Kill) -> None:
    """Have this process killed so, once it trains."""
    taken, timed = 0, Trainer._timed

    def counted(self: Trainer, *given: Any) -> None:
        nonlocal taken
        if taken == kill.after:
            arm(kill, self)
        taken += 1
        timed(self, *given)

    Trainer._timed = counted  # type: ignore[method-assign]


def arm(kill: Kill, run: Trainer) -> None:
    """The functions are the product's own; a first call of the one that begins the phase starts the clock."""
    owner, name = {
        ANY: (run.world, "at_step"),
        "rollout": (run.arena, "play"),
        "judging": (run.judge, "submit"),
        "update": (steps, "accumulate_policy_gradient"),
        "reduction": (run.optimizer, "squared_grad_norm"),
        "gathering": (run.optimizer, "step"),
        "lines": (run.run_dir, "append_dialogues"),
        "saving": (trainer, "write_state"),
        "verifying": (run_dir, "write_checksums"),
    }[kill.phase]
    real = getattr(owner, name)

    def begun(*given: Any, **named: Any) -> Any:
        threading.Timer(kill.delay, die, [kill.victim is None]).start()
        return real(*given, **named)

    setattr(owner, name, begun)


def die(with_all: bool) -> None:
    if with_all:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def rank(argv: Sequence[str], number: int, ranks: int, port: int, kill: Kill | None, said: Path) -> NoReturn:
    """Be this rank of a run, as if torchrun had started it."""
    code = 70
    try:
        with said.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if ranks > 1:
            numbers = {"RANK": number, "WORLD_SIZE": ranks, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": ranks}
            os.environ |= {name: str(value) for name, value in numbers.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "c"}
        if kill is not None and kill.victim in (None, number):
            aim(kill)
        code = duologue(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


# ---- starts ------------------------------------------------------------------------------------------------


def arguments(run: Path, settings: Sequence[str]) -> list[str]:
    """Of a run that goes on where there is something to go on with."""
    resume = ["--resume"] if (run / "config.toml").is_file() else []
    return ["train", *settings, "--run-dir", str(run), *resume]


def forked(run: Path, ranks: int, settings: Sequence[str], kill: Kill | None = None) -> bool:
    """Start the ranks and wait until all are gone; whether they came to their end before the kill."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv, said, pids = arguments(run, settings), run.with_name(f"{run.name}.said"), [0] * 0
    for number in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            rank(argv, number, ranks, port, kill, said)
        with contextlib.suppress(OSError):  # the child has done it, or is gone
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    codes = waited(pids)
    if not any(codes):
        return True
    killed = [number for number, code in enumerate(codes) if code == -signal.SIGKILL]
    if kill is None or not killed or (kill.victim is not None and kill.victim not in killed):
        text = said.read_text("utf-8", "replace")[-3000:]
        raise SystemExit(f"the ranks ended with {codes} where {kill} was to happen:\n{text}")
    return False


def waited(pids: Sequence[int]) -> list[int]:
    """Exit codes, negative for signals."""
    codes: dict[int, int] = {}
    ends = time.monotonic() + LIMIT_S
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
        if time.monotonic() > ends:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"a start of the run did not end within {LIMIT_S} s: it hangs")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def by_command(run: Path, ranks: int, settings: Sequence[str], rng: random.Random | None = None) -> str:
    """Start the command line; with `rng` kill a rank, or the starter and all, at a moment that it draws. What
    was killed; "" where the run came to its end.
    """
    more = ["--ranks", str(ranks)] if ranks > 1 else []
    words = [sys.executable, "-m", "duologue.grpo.cli", *arguments(run, settings), *more]
    with run.with_name(f"{run.name}.said").open("ab") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, cwd=run.parent)
    victim = "" if rng is None else killed(process, run, ranks, rng)
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        end_all(process)
        raise SystemExit(f"a start of the run did not end within {LIMIT_S} s: it hangs") from None
    if code and not victim:
        raise SystemExit(f"the run ends with {code} even when nobody kills it")
    return victim


def killed(process: subprocess.Popen[bytes], run: Path, ranks: int, rng: random.Random) -> str:
    """Who was killed, "" where the run ended before; until all are gone."""
    lines, began = run / "metrics.jsonl", time.monotonic()
    size, steps_to_come, seen = rng.randint(1, 4), 0, -1
    while process.poll() is None and time.monotonic() < began + LIMIT_S:
        now = lines.stat().st_size if lines.is_file() else 0
        steps_to_come += 0 <= seen < now  # a resume cuts the file, each step makes it longer
        seen = now
        if steps_to_come >= size:
            break
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.2))
    of_ranks = children(process.pid) if ranks > 1 else []
    if process.poll() is not None:
        return ""
    victim = rng.choice(["starter and all", *of_ranks])
    if isinstance(victim, int):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    else:
        end_all(process)
    ends = time.monotonic() + LIMIT_S
    while any(alive(pid) for pid in of_ranks):
        if time.monotonic() > ends:
            raise SystemExit("a rank lives on after the run has ended")
        time.sleep(0.05)
    return "a rank" if isinstance(victim, int) else victim


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    return []


def end_all(process: subprocess.Popen[bytes]) -> None:
    """It and its ranks."""
    for pid in (process.pid, *children(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(LIMIT_S)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] != "Z"
    return False


# ---- what came of it ---------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def result(run: Path) -> dict[str, str]:
    """Digests of what the run came to."""
    metrics = [
        {k: v for k, v in row.items() if k not in TIMES and not k.startswith(COSTS)}
        for row in lines(run / "metrics.jsonl")
    ]
    last = max((run / "checkpoints").glob("step_*"))
    weights = {
        str(f.name): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(last.glob("*.safetensors"))
    }
    facts = {"metrics": metrics, "dialogues": lines(run / "dialogues.jsonl"), "weights": weights}
    return {k: hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest() for k, v in facts.items()}


def same(whole: Path, killed: Path, **facts: Any) -> dict[str, Any]:
    """The row of the comparison."""
    a, b = result(whole), result(killed)
    differ = [name for name in a if a[name] != b[name]]
    row = {**facts, "differ": differ, "weights": b["weights"][:16]}
    print(json.dumps(row), flush=True)
    if differ:
        raise SystemExit(f"after the kills {', '.join(differ)} of {killed} differ from {whole}")
    return row


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def saved(run: Path) -> int:
    """Steps of the last checkpoint, -1 without any."""
    return max((steps_of(path) for path in (run / "checkpoints").glob("step_*")), default=-1)


def drawn(number: int, phases: Sequence[str], ranks: int, steps: int, rng: random.Random) -> Kill:
    """The phases in turn, so that none is left out, and any moment."""
    phase = (*phases, ANY)[number % (len(phases) + 1)]
    longest = {"rollout": 0.2, ANY: 0.5}.get(phase, 0.02)
    victim = rng.choice([None, *range(ranks)])
    if phase in ("saving", "verifying", "lines") and victim is not None:
        victim = 0  # who writes
    return Kill(phase, rng.randint(0, steps), round(rng.choice([0, rng.uniform(0, longest)]), 4), victim)


def chaos(where: Path, options: argparse.Namespace, settings: Sequence[str]) -> None:
    ranks, kills, rng, began = options.ranks, options.kills, random.Random(options.seed), time.monotonic()
    phases = JUDGED if options.judged else PHASES
    whole, run = where / "whole", where / "killed"
    forked(whole, ranks, settings)
    number, each = 0, max(options.steps // max(kills, 1), 1)
    while number < kills:
        at = time.monotonic()
        command = number % 5 == 4 and not options.forked
        if command:
            victim = by_command(run, ranks, settings, rng)
            row: dict[str, Any] = {"phase": "of a command", "victim": victim}
            ended = not victim
        else:
            kill = drawn(number + options.seed, phases, ranks, 2 * each, rng)
            ended = forked(run, ranks, settings, kill)
            victim = "all" if kill.victim is None else kill.victim
            row = {"phase": kill.phase, "after_steps": kill.after, "delay_s": kill.delay, "victim": victim}
        if ended:  # before the kill: once more from nothing
            same(whole, run)
            shutil.rmtree(run)
            continue
        number += 1
        row |= {"took_s": round(time.monotonic() - at, 2), "checkpoint": saved(run)}
        print(json.dumps({"kill": number, **row}), flush=True)
    if options.forked:
        forked(run, ranks, settings)
    else:
        by_command(run, ranks, settings)
    facts = {"kills": kills, "ranks": ranks, "judged": options.judged, "seed": options.seed}
    row = same(whole, run, **facts, seconds=round(time.monotonic() - began))
    if options.save:
        append_rows("chaos", [row | {"differ": ""}])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of self-play")
    parser.add_argument("--judged", action="store_true", help="a game whose outcomes a judge scores")
    parser.add_argument("--forked", action="store_true", help="every start, which is quicker")
    parser.add_argument("--save", action="store_true", help="append the row to results/chaos.csv")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: nowhere)")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as open_until_the_end:
        where = options.folder or Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        settings = [*RUN, *more, f"train.steps={options.steps}"]
        if options.judged:
            policy = where / "policy"
            forked(policy, 1, [*RUN, "train.steps=0", "model.max_position=2000"])
            start = policy / "checkpoints" / "warm_start"
            judged = open_until_the_end.enter_context(judged_run(where, start))
            settings = [*judged, *more, f"train.steps={options.steps}"]
        chaos(where, options, settings)


if __name__ == "__main__":
    main()
