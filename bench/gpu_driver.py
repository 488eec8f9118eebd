"""Runs the stages of a GPU session: each a process of its own with its own limit, so that a crash, a sticky
CUDA error or a limit loses one stage; each result a line of JSON on disk before the next begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.bare import ROOT, find_package

SUMMARY = 8_000  # characters of what is printed at the end
DRY_SECONDS = 1_800.0  # for all stages on the CPU, which may be busy
TAIL = 1_500  # characters of a stage's output that are kept with its row
GRACE = 5.0  # seconds before its limit at which a stage is interrupted, and can say where it was


class Rows:
    """Results, one line of JSON each, on disk as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, stage: str, **values: Any) -> None:
        line = json.dumps({"stage": stage, **values}, default=str)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def check(self, stage: str, what: str, test: Callable[[], dict[str, Any]]) -> None:
        """The row of a check: `test` gives `ok` and what it measured; what it raises is a row too."""
        began = time.perf_counter()
        try:
            values = test()
        except Exception as error:
            values = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:600]}"}
        self.add(stage, what=what, **values, seconds=round(time.perf_counter() - began, 2))

    def read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage: its name, the seconds that are kept for it, and its process."""

    name: str
    seconds: float
    command: Sequence[str]
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a stage runs: "cuda" or "cpu", and whether at tiny size."""

    device: str
    dry: bool
    out: Path

    @property
    def rows(self) -> Rows:
        return Rows(self.out / "rows.jsonl")

    def jobs(self, module: str, kept: dict[str, float], **env: str) -> list[Job]:
        """Stages of `module`, which `stage_main` starts, and the seconds kept for them. Dry they share a
        process: then the imports are most of the work.
        """
        where = ["--device", self.device, "--out", str(self.out), *(["--dry"] if self.dry else [])]
        base = [sys.executable, "-m", module]
        if self.dry:
            kept = {",".join(kept): sum(kept.values())}
        return [
            Job(name=name, seconds=seconds, command=[*base, name, *where], env=tuple(env.items()))
            for name, seconds in kept.items()
        ]


def run_job(job: Job, rows: Rows, seconds: float) -> None:
    """Run it for at most `seconds`, and add a row on how it ended; all its processes are gone afterwards."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(job.env)}
    began = time.perf_counter()
    process = subprocess.Popen(
        list(job.command),
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    grace, late = min(GRACE, seconds / 4), False
    try:
        output, _ = process.communicate(timeout=seconds - grace)
    except subprocess.TimeoutExpired:
        late = True
        output = _ended(process, grace)
    took = round(time.perf_counter() - began, 1)
    ended: dict[str, Any] = {"rc": process.returncode, "seconds": took, "limit": round(seconds)}
    ended["ok"] = process.returncode == 0
    if late:
        ended["late"] = True
    rows.add(job.name, ended=True, **ended, tail=output[-TAIL:])


def _ended(process: subprocess.Popen[str], grace: float) -> str:
    """The output of a process that is interrupted, and killed with its children after so many seconds."""
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return output


def run_all(jobs: Sequence[Job], rows: Rows, seconds: float, least: float = 3.0) -> int:
    """Run the jobs in order within `seconds` together, print the summary; 1 when anything failed.

    A job may take up to twice its own seconds of what those before it left over, never of what is kept for
    those behind it: one that hangs costs no other.
    """
    ends = time.perf_counter() + seconds
    later = sum(job.seconds for job in jobs)
    for job in jobs:
        later -= job.seconds
        left = ends - time.perf_counter()
        if left < least:
            rows.add(job.name, ended=True, ok=False, left_out=True)
            continue
        print(f"{job.name} ...", flush=True)
        run_job(job, rows, min(left, max(job.seconds, min(2 * job.seconds, left - later))))
    found = rows.read()
    text = summary(found)
    (rows.path.parent / "summary.txt").write_text(text + "\n", "utf-8")
    print(text, flush=True)
    return int(not all(row.get("ok", True) for row in found))


def summary(found: Sequence[dict[str, Any]]) -> str:
    """At most SUMMARY characters: failures first, then every row in short."""
    bad = [row for row in found if not row.get("ok", True)]
    lines = [f"{len(found)} rows, {len(bad)} failed"]
    for row in bad:
        reason = str(row.get("error") or row.get("tail", "")).strip()[-400:]
        lines.append(f"FAILED {short(row, ('error', 'tail'))} {reason}")
    lines += [short(row, ("tail", "error")) for row in found if row not in bad]
    text = "\n".join(lines)
    return text if len(text) <= SUMMARY else text[: SUMMARY - 20] + "\n... see rows.jsonl"


def short(row: dict[str, Any], without: Sequence[str]) -> str:
    """A row in at most 300 characters."""
    words = (f"{key}={value}" for key, value in row.items() if key not in ("stage", *without))
    return f"{row['stage']}: {' '.join(words)}"[:300]


def parsed(description: str | None, seconds: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a folder for the results (default: $OUT, or here)")
    parser.add_argument("--seconds", type=float, default=seconds, help="for all stages together")
    parser.add_argument("--only", default="", help="stages whose name holds this")
    parser.add_argument("--dry", action="store_true", help="every stage at tiny size on the CPU")
    return parser.parse_args()


def drive(description: str | None, seconds: float, jobs_of: Callable[[Place], list[Job]]) -> int:
    """The command line of a session."""
    args = parsed(description, seconds)
    find_package()
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("there is no CUDA device; --dry runs every stage on the CPU at tiny size", file=sys.stderr)
        return 2
    out = (args.out or Path(os.environ.get("OUT", "."))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    place = Place("cpu" if args.dry else "cuda", args.dry, out)
    place.rows.path.unlink(missing_ok=True)
    jobs = [job for job in jobs_of(place) if args.only in job.name]
    if args.dry:  # a slow processor decides nothing here
        jobs = [replace(job, seconds=DRY_SECONDS / len(jobs)) for job in jobs]
        return run_all(jobs, place.rows, DRY_SECONDS)
    return run_all(jobs, place.rows, args.seconds)


def stage_main(stages: dict[str, Callable[[Place], None]]) -> int:
    """The command line of a module of stages: NAME --device D --out FOLDER [--dry]."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", type=lambda text: text.split(","), help=f"some of {','.join(stages)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    for name in args.names:
        stages[name](Place(args.device, args.dry, args.out))
    return 0
