"""`doctor --ranks N`: whether N processes here could train together, each thing with what to do about it.

The all-reduce is a real one: this module run as a program is one of its ranks.
"""

from __future__ import annotations

import datetime
import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from duologue.grpo.plan import GB, memory_limits
from duologue.kernels import cores
from rich.console import Console
from rich.table import Table

SECONDS = 90  # that the ranks may take to find each other and to add up
NUMBERS = 4 * 2**20  # fp32, that are added up
ROUNDS = 3
SHM_PER_RANK, DISK, MEMORY_PER_RANK = 64 * 2**20, 2 * GB, GB  # what a small run needs at least


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    found: str
    advice: str = ""


def devices(ranks: int, gpus: int, n_cores: int) -> Finding:
    if gpus:
        advice = "start as many ranks as there are GPUs here, or more nodes"
        return Finding("devices", gpus >= ranks, f"{gpus} GPUs for {ranks} ranks", advice)
    advice = "start fewer ranks, or widen the process's affinity (taskset): ranks share cores here"
    return Finding("devices", n_cores >= ranks, f"no GPU; {n_cores} cores for {ranks} ranks", advice)


def space(name: str, where: str, free: int, needed: int, advice: str) -> Finding:
    """Of memory, a disk or /dev/shm."""
    found = f"{free / GB:.2f} GB free{where}, {needed / GB:.2f} needed at least"
    return Finding(name, free >= needed, found, advice)


def loopback() -> tuple[Finding, int]:
    """And a port that is free now."""
    try:
        with socket.socket() as listener, socket.socket() as caller:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            port: int = listener.getsockname()[1]
            caller.settimeout(5)
            caller.connect(("127.0.0.1", port))
    except OSError as error:
        return Finding("loopback", False, str(error), "bring up the interface lo and allow ports on it"), 0
    return Finding("loopback", True, f"port {port} is free and answers"), port


def reduction(ranks: int, port: int, backend: str, seconds: float = SECONDS) -> Finding:
    """An all-reduce among `ranks` processes, its result checked, with its bandwidth."""
    name, advice = f"all-reduce ({backend})", "see the message; NCCL_DEBUG=INFO or TORCH_CPP_LOG_LEVEL=INFO"
    command = [sys.executable, "-m", "duologue.grpo.commands.ranks", backend, str(ranks), str(port)]
    workers = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    ends, said = time.monotonic() + seconds, []
    try:
        for rank, worker in enumerate(workers):
            out, problem = worker.communicate(timeout=max(ends - time.monotonic(), 0.1))
            if worker.returncode:
                last = (problem.strip().splitlines() or [f"exit code {worker.returncode}"])[-1]
                return Finding(name, False, f"rank {rank}: {last}", advice)
            said.append(json.loads(out.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"no result in {seconds:g} s", advice)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            for stream in (worker.stdout, worker.stderr):
                if stream is not None:
                    stream.close()
    wrong = [rank for rank, result in enumerate(said) if not result["right"]]
    if wrong:
        return Finding(name, False, f"wrong sums on ranks {wrong}", "do not train on this machine")
    slowest = max(result["seconds"] for result in said)
    return Finding(
        name, True, f"right on {ranks} ranks, {4 * NUMBERS / slowest / GB:.2f} GB of sums per second"
    )


def findings(ranks: int) -> list[Finding]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shm = Path("/dev/shm")
    answers, port = loopback()
    found = [
        devices(ranks, gpus, cores.thread_count()),
        space(
            "shared memory",
            " in /dev/shm",
            shutil.disk_usage(shm).free if shm.is_dir() else 0,
            ranks * SHM_PER_RANK,
            "mount a larger /dev/shm (in a container: --shm-size)",
        ),
        space("disk", " here", shutil.disk_usage(".").free, DISK, "free some, or run elsewhere (--run-dir)"),
        space(
            "memory",
            "",
            memory_limits("cpu")[1],
            ranks * MEMORY_PER_RANK,
            "start fewer ranks, or end what else runs here",
        ),
        answers,
    ]
    backend = "nccl" if gpus >= ranks else "gloo"
    if not torch.distributed.is_available():
        found.append(
            Finding(backend, False, "torch has no distributed part", "install another build of torch")
        )
    elif port:
        found.append(reduction(ranks, port, backend))
    return found


def examine_ranks(ranks: int) -> int:
    """Print the findings; 1 where a run could not start."""
    if not 1 <= ranks <= 1024:
        raise ValueError(f"--ranks {ranks}: accepted is 1 to 1024")
    found = findings(ranks)
    table = Table(show_header=False, box=None)
    for finding in found:
        advice = "" if finding.ok else f": {finding.advice}"
        table.add_row(finding.name, "ok" if finding.ok else "NOT OK", finding.found + advice)
    Console(highlight=False).print(table)
    return 0 if all(finding.ok for finding in found) else 1


def work(backend: str, ranks: int, port: int, rank: int) -> None:
    """One rank: prints whether the sums were right and the seconds of the quickest round."""
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=SECONDS)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=where, world_size=ranks, rank=rank, timeout=limit)
    right, quickest = True, float("inf")
    for _ in range(ROUNDS):
        numbers = torch.full((NUMBERS,), float(rank + 1), device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.monotonic()
        dist.all_reduce(numbers)
        right = right and bool((numbers == ranks * (ranks + 1) / 2).all())  # waits for the device
        quickest = min(quickest, time.monotonic() - began)
    dist.destroy_process_group()
    print(json.dumps({"right": right, "seconds": quickest}))


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
