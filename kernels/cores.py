"""How many threads the machine gives this process: one for each physical core that it may run on (two
hyper-threads of a core share the units that these kernels keep busy), and no more than a container's share of
time allows. And how much memory a container leaves it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def physical_cores(cpus: set[int], root: Path = Path("/")) -> int:
    """The cores behind these logical processors; one that the system does not describe counts as a core."""
    found = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        place = (_text(topology / "physical_package_id"), _text(topology / "core_id"))
        siblings = _text(topology / "thread_siblings_list")
        found.add((siblings, *place) if siblings or all(place) else (str(cpu),))
    return len(found)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The control groups that share something out to this process, its own and those above it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        above = root / "sys/fs/cgroup" / controllers
        own = above / path.strip("/")
        yield from (group for group in (own, *own.parents) if group.is_relative_to(above))
        yield above  # inside a container its own group is often mounted as the top


def time_limit(root: Path = Path("/")) -> float:
    """Processors' worth of time that this process's control groups leave it; inf without a limit."""
    shares = [math.inf]
    for group in _groups(root, "cpu"):
        words = _text(group / "cpu.max").split()  # version 2: "max 100000" or "150000 100000"
        if not words:  # version 1, where no limit is -1
            words = [_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
            shares.append(int(words[0]) / int(words[1]))
    return min(shares)


def memory_limit(root: Path = Path("/")) -> float:
    """Bytes that this process's control groups leave it; inf without a limit."""
    found = [
        _text(group / name)
        for group in _groups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")  # versions 2 and 1
    ]
    return min((int(text) for text in found if text.isdecimal()), default=math.inf)


def available_cpus() -> set[int]:
    """The logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def thread_count(root: Path = Path("/")) -> int:
    """Threads to use, at least one."""
    limit = time_limit(root)
    cores = physical_cores(available_cpus(), root)
    return cores if limit == math.inf else max(1, min(cores, math.ceil(limit)))


def describe(root: Path = Path("/")) -> str:
    """One line on what was found."""
    cpus, limit = available_cpus(), time_limit(root)
    share = "no limit of time" if limit == math.inf else f"time of {limit:g} processors"
    cores = physical_cores(cpus, root)
    return f"{cores} physical cores, {len(cpus)} logical processors, {share}"
