"""Starts the ranks of a run by torchrun, as a rank meets the others, and ends it with all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.config import Config
from duologue.grpo.distributed.run_dir import FollowerDir, LeaderDir
from duologue.grpo.distributed.watch import SAID, note_said, say
from duologue.grpo.distributed.world import Ranks, environment
from duologue.grpo.run_dir import RunDir
from duologue.kernels import cores
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(ranks: int, argv: Sequence[str], grace_s: float) -> int:
    """Start the command line `argv` as so many processes here, and return the exit code of them together. A
    signal to this process is one to all, which have `grace_s` to save.
    """
    for name in [*logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    settings: dict[str, Any] = {"shutdown_timeout": int(grace_s)}
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # of older versions: it has 30 s
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        **{name: value for name, value in settings.items() if name in known},
    )
    with tempfile.TemporaryDirectory() as folder, _signals_restored():
        os.environ[SAID] = str(said := Path(folder) / "said")
        try:
            elastic_launch(config, sys.executable)("-m", "duologue.grpo.cli", *argv)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            if not said.exists():
                how = f"exit code {failure.exitcode}"
                how = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else how
                say(f"rank {rank} ended by {how}")
                return max(failure.exitcode, 1)
            return int(said.read_text("ascii") or 1)
        except SignalException:
            if all(ended(said, rank).exists() for rank in range(ranks)):
                return 0
            say(f"a signal ended the ranks before all had saved, train.rank_timeout_s = {grace_s:g} after it")
            return 1
    return 0


def ended(said: Path, rank: int) -> Path:
    """A file that exists once this rank has come to a good end."""
    return said.with_name(f"ended.{rank}")


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """torchrun takes the signals for itself."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        os.environ.pop(SAID, None)
        for number, handler in before.items():
            signal.signal(number, handler)


def use_cores(config: Config) -> Config:
    """This rank's part of what the machine has: its GPU, or its cores where `train.threads` does not say."""
    local = environment()
    device, threads = config.model.device, config.train.threads
    if device.startswith("cuda"):
        torch.cuda.set_device(local["LOCAL_RANK"])
        device = f"cuda:{local['LOCAL_RANK']}"
    threads = threads or max(cores.thread_count() // local["LOCAL_WORLD_SIZE"], 1)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, device=device),
        train=dataclasses.replace(config.train, threads=threads),
    )


@contextlib.contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """The other ranks. An error in here is the run's, said once; those who meet it second say nothing."""
    world = Ranks(config.model.device, config.train.rank_timeout_s)
    try:
        yield world
    except BaseException as error:
        if not world.watch.fail(f"rank {world.rank}: {error}"):
            os._exit(1)
        note_said(2 if isinstance(error, ValueError) else 1)  # as the command line has it
        raise
    world.close()
    if said := os.environ.get(SAID):
        ended(Path(said), world.rank).touch()


def opened(world: Ranks, open_run: Callable[[type[RunDir]], RunDir | None]) -> RunDir | None:
    """The run, which the first rank opens and the others follow; None where it is finished already."""
    if not world.is_first:
        path = world.each("")[0]
        return FollowerDir(Path(path), world) if path else None
    run = open_run(LeaderDir)
    if run is not None:
        assert isinstance(run, LeaderDir)
        run.world = world
    world.each("" if run is None else str(run.path))
    return run
