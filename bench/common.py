"""Timing and result rows, shared by the benches."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def take_turns(
    runs: Mapping[str, Callable[[], Any]], *, repeats: int = 100, seconds: float = 0.5
) -> dict[str, list[float]]:
    """Seconds per call of each run, sorted. The runs alternate in blocks, so that all see the same machine.

    A pause between blocks lets the other side's spinning threads fall asleep, and a block's first 10 ms, in
    which threads find their cores, do not count.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        run()
        began = time.perf_counter()
        run()
        once = time.perf_counter() - began
        found[name].append(once)
    for _ in range(3):
        for name, run in runs.items():
            time.sleep(0.05)
            began = time.perf_counter()
            while time.perf_counter() - began < 0.01:
                run()
            for _ in range(max(2, min(repeats, int(seconds / 3 / max(found[name][0], 1e-6))))):
                began = time.perf_counter()
                run()
                found[name].append(time.perf_counter() - began)
    return {name: sorted(values[1:]) for name, values in found.items()}


def best_seconds(run: Callable[[], Any], device: str = "cpu") -> float:
    """Of five calls after a first."""
    best = float("inf")
    for i in range(6):
        began = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        if i:
            best = min(best, time.perf_counter() - began)
    return best


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of copying 256 MB."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / take_turns({"copy": lambda: target.copy_(source)}, repeats=5)["copy"][0]


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.get_num_threads()} torch threads"
    return platform.machine()


def append_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to results/<name>.csv, with device, commit and date."""
    path = RESULTS / f"{name}.csv"
    new = not path.exists()
    stamp = {"device": device(), "commit": commit(), "date": datetime.date.today().isoformat()}
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *stamp])
        if new:
            writer.writeheader()
        writer.writerows([{**row, **stamp} for row in rows])
