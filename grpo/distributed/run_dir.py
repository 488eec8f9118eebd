"""The run's directory as the ranks see it: the first one writes, the others wait until it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from duologue.grpo.distributed.world import Ranks
from duologue.grpo.run_dir import RunDir


class FollowerDir(RunDir):
    """Of every rank but the first: it reads what the first has locked, and writes nothing."""

    def __init__(self, path: Path, world: Ranks) -> None:
        self.path, self.world = path, world
        self.notes: list[str] = []

    def close(self) -> None:
        return

    def forget_if_new(self) -> None:
        return

    def append_metrics(self, row: dict[str, Any]) -> None:
        return

    def append_dialogues(self, rows: Iterable[dict[str, Any]]) -> None:
        return

    def go_on_from(self, step: int) -> None:
        self.world.agree(False)

    def drop_trained(self, step: int) -> None:
        return

    def save_checkpoint(
        self, name: str, write: Callable[[Path], None], keep: int = 0, needed: int = 0
    ) -> Path:
        self.world.agree(False)
        return self.path / "checkpoints" / name

    def write_summary(self, summary: dict[str, Any]) -> None:
        return


class LeaderDir(RunDir):
    """Of the first rank: the others go on when it has written. `world` is set once the run is open."""

    world: Ranks

    def go_on_from(self, step: int) -> None:
        super().go_on_from(step)
        self.world.agree(False)

    def save_checkpoint(
        self, name: str, write: Callable[[Path], None], keep: int = 0, needed: int = 0
    ) -> Path:
        path = super().save_checkpoint(name, write, keep, needed)
        self.world.agree(False)
        return path
