"""Command lines in processes that are forked from one that has imported everything, so that a start takes no
seconds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import chaos as chaos

LIMIT_S = 600
FORKS = multiprocessing.get_context("forkserver")
MODULES = ("trainer", "cli", "plan", "commands.report", "commands.players", "distributed.launch")
FORKS.set_forkserver_preload([*(f"duologue.grpo.{m}" for m in MODULES), "torch.distributed.run"])


class Started:
    """A process; what it says is in files beside `path`."""

    def __init__(self, path: Path, command: str, *argv: str) -> None:
        """`command` is duologue, torchrun or chaos."""
        self._said = [path.with_name(f"{path.name}.{name}") for name in ("out", "err")]
        for file in self._said:
            file.unlink(missing_ok=True)
        self.process = FORKS.Process(target=_run, args=(self._said, command, argv))
        self.process.start()
        self.pid = self.process.pid or 0

    def lives(self) -> bool:
        return self.process.is_alive()

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ended(self) -> tuple[int | None, str, str]:
        """Exit code, and what it said to each."""
        self.process.join(LIMIT_S)
        self.process.kill()
        out, err = (file.read_text("utf-8") for file in self._said)
        return self.process.exitcode, out, err


def _run(said: list[Path], command: str, argv: tuple[str, ...]) -> None:
    for number, path in zip((1, 2), said, strict=True):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    sys.argv = [command, *argv]
    if command == "duologue":
        from duologue.grpo.cli import main

        sys.exit(main(argv))
    elif command == "chaos":
        chaos.main()
    else:
        from torch.distributed.run import main as torchrun

        torchrun([*argv])


def limited_rank(file_bytes: int, *given: Any) -> None:
    """A rank as if torchrun had started it, which can write no larger files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    chaos.rank(*given)
