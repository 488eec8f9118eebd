"""Timing and result rows, shared by the benches."""

from __future__ import annotations

import csv
import datetime
import io
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from duologue.kernels import backend, ops
from duologue.model.atomic import write_file
from torch import Tensor

CYCLES = 2e9  # of a GPU's clock per second, about
RESULTS = Path(__file__).resolve().parent / "results"


def calls(
    run: Callable[[], Any],
    *,
    seconds: float = 0.5,
    fewest: int = 5,
    most: int = 50,
    warm_up: float = 0.01,
    device: str = "cpu",
) -> list[float]:
    """Seconds of each of `fewest` to `most` calls, sorted; about `seconds` for all of them. On a GPU by
    `device_calls`.

    Calls in the first `warm_up` seconds, in which threads find their cores, do not count.
    """
    if device != "cpu":
        return device_calls(run, seconds, fewest, most, device)
    ends = time.perf_counter() + warm_up
    while time.perf_counter() < ends:
        run()
    found: list[float] = []
    ends = time.perf_counter() + seconds
    while len(found) < fewest or (len(found) < most and time.perf_counter() < ends):
        found.append(_seconds(run))
    return sorted(found)


def _seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    run()
    return clock() - began


def device_calls(run: Callable[[], Any], seconds: float, fewest: int, most: int, device: str) -> list[float]:
    """Seconds that a GPU takes for each call, sorted, without what the host takes to launch it: all are
    queued while the GPU sleeps, each between two events. Before each the L2 cache is written over, so that a
    call reads its inputs from memory.
    """
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    cache = torch.empty(size, dtype=torch.uint8, device=device)
    run()  # compiles
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    n = max(fewest, min(most, int(seconds / (time.perf_counter() - began))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    torch.cuda._sleep(int(min(2 * n * launched, 1.0) * CYCLES))
    for first, last in events:
        cache.zero_()
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    return sorted(first.elapsed_time(last) / 1e3 for first, last in events)


def take_turns(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 3,
    seconds: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of the calls of each run, sorted. The runs alternate, so that all see the same machine.

    In a round each run has a block of calls, `seconds` in all rounds together, or one call where that is 0:
    for runs that take seconds themselves, by `clock`. A pause between blocks lets the other side's spinning
    threads fall asleep.
    """
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.05)
            if seconds:
                found[name] += calls(run, seconds=seconds / rounds, fewest=2, most=100)
            else:
                found[name].append(_seconds(run, clock))
    return {name: sorted(times) for name, times in found.items()}


def tokens_per_second(
    runs: Mapping[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median of each run, which returns how many tokens it made; the runs take turns."""
    tokens: dict[str, int] = {}

    def counted(name: str, run: Callable[[], int]) -> None:
        tokens[name] = run()

    counting = {name: partial(counted, name, run) for name, run in runs.items()}
    times = take_turns(counting, rounds=rounds, seconds=0, clock=clock)
    return {name: tokens[name] / statistics.median(times[name]) for name in runs}


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def copy_bandwidth(device: str = "cpu", size: int = 2**28) -> float:
    """Bytes per second, read plus written, of copying `size` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / calls(lambda: target.copy_(source), fewest=15, device=device)[0]


def product_rate(x: Tensor, weight: Tensor) -> float:
    """FLOP per second of x [M, K] @ weight [O, K]^T, on CPU by torch or by our own, whichever is faster."""
    runs = [lambda: x @ weight.t()]
    if x.device.type == "cpu":
        runs.append(lambda: ops.linear(x, weight))
    with torch.no_grad():
        best = min(calls(run, fewest=15, device=x.device.type)[0] for run in runs)
    return 2 * len(x) * weight.numel() / best


def ceilings(device: str, tiny: bool = False) -> tuple[float, float]:
    """(bytes per second of a copy, FLOP per second of a product in bf16 on a GPU and fp32 on CPU), here and
    now."""
    size, side, dtype = (2**31, 8192, torch.bfloat16) if device != "cpu" else (2**28, 1024, torch.float32)
    if tiny:
        size, side = 2**14, 64
    a = torch.randn(side, side, device=device, dtype=dtype)
    return copy_bandwidth(device, size), product_rate(a, a)


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device() -> str:
    """The name of the GPU or the processor, with what of the latter decides a rate: one name covers
    processors of several instruction sets.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            serves = f" ({backend.isa_name()})" if backend.available() else ""
            return f"{line.split(':')[1].strip()}{serves}, {torch.get_num_threads()} torch threads"
    return platform.machine()


def append_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to results/<name>.csv, with device, commit and date. What older rows lack is empty in them."""
    path = RESULTS / f"{name}.csv"
    before: list[dict[str, Any]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            before = list(csv.DictReader(file))
    stamp = {"device": device(), "commit": commit(), "date": datetime.date.today().isoformat()}
    table = [*before, *({**row, **stamp} for row in rows)]
    columns = [key for key in dict.fromkeys(key for row in table for key in row) if key not in stamp]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns, *stamp], restval="")
    writer.writeheader()
    writer.writerows(table)
    write_file(path, text.getvalue().encode())
