"""What a person sees while a run trains: the numbers that matter, live in a terminal and as plain lines
elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from duologue.rollout.games.game import Measure
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# What a step of training shows beside the game's own measures: metric -> (heading, format)
REWARD = {"reward": ("reward", "{:.3f}")}
TRAINING = {
    "loss": ("loss", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "kl_start": ("KL start", "{:.4f}"),
    "mismatch": ("mismatch", "{:.1e}"),
    "resampled_groups": ("played again", "{:.0f}"),
    "rollout_tokens_per_s": ("rollout tok/s", "{:,.0f}"),
    "update_tokens_per_s": ("update tok/s", "{:,.0f}"),
}
COUNT = {"dialogues": Measure("dialogues", "{:.0f}")}  # below every table of measures


UNKNOWN = "-"  # a number that is null in a file


def formatted(form: str, value: Any) -> str:
    return form.format(value) if isinstance(value, int | float) and math.isfinite(value) else UNKNOWN


class Progress:
    """`stage`, then `update` after each step. `measures` are the game's; `quiet` shows nothing."""

    def __init__(
        self,
        quiet: bool = False,
        console: Console | None = None,
        measures: Mapping[str, Measure] = MappingProxyType({}),
    ) -> None:
        self.measures = measures
        self.console = console or Console(quiet=quiet, highlight=False, markup=False)
        self._live: Live | None = None
        self._stage = ""
        self._total = 0
        self._begin = (0, 0.0)
        self._last_line = 0.0
        self._latest: dict[str, Any] = {}

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A new stage of `total` steps, of which `done` were done by an earlier process."""
        self.close()
        self._stage, self._total, self._begin, self._latest = name, total, (done, time.monotonic()), {}
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`step` steps of the stage are done. A metric that is not measured on every step keeps its latest
        value.
        """
        self._latest |= {key: value for key, value in metrics.items() if value is not None}
        if self._live is not None:
            self._live.update(self._view(step))
        elif time.monotonic() - self._last_line > 10 or step == self._total:
            self._last_line = time.monotonic()
            cells = "  ".join(f"{title} {value}" for title, value in self._cells())
            self.log(f"{self._stage} {step}/{self._total}  {cells}  left {self._left(step)}")

    def log(self, message: str) -> None:
        self.console.print(message, soft_wrap=True)

    def results(self, columns: Mapping[str, Mapping[str, float]], title: str) -> None:
        """The table at the end: one column per policy."""
        self.close()
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name in columns:
            table.add_column(name, justify="right")
        for key, measure in {**self.measures, **COUNT}.items():
            if all(key in column for column in columns.values()):
                values = (formatted(measure.format, column[key]) for column in columns.values())
                table.add_row(measure.heading, *values)
        self.console.print(table)

    def close(self) -> None:
        """End the live display; its last state stays to be read."""
        if self._live is not None:
            last = self._live.renderable
            self._live.stop()
            self._live = None
            if self._latest:
                self.console.print(last)

    def _cells(self) -> list[tuple[str, str]]:
        partners = self._latest.get("partners", {}).items()  # the reward with each
        by_partner = [(f"with {name}", formatted("{:.3f}", row["policy"])) for name, row in partners]
        of_game = {key: (m.short, m.format) for key, m in self.measures.items() if m.short}
        cells = [
            (title, form.format(self._latest[key]))
            for key, (title, form) in {**REWARD, **of_game, **TRAINING}.items()
            if key in self._latest
        ]
        return [*cells[:1], *by_partner, *cells[1:]]

    def _view(self, step: int) -> Group:
        bar = ProgressBar(total=max(self._total, 1), completed=step, width=60)
        head = Text.assemble(
            (self._stage, "bold"), f"  step {step} of {self._total}, {self._left(step)} left"
        )
        numbers = Text("   ").join(
            Text.assemble((f"{title} ", "dim"), value) for title, value in self._cells()
        )
        return Group(head, Padding(bar, 0), numbers)

    def _left(self, step: int) -> str:
        done, since = self._begin
        if step <= done:
            return "?"
        seconds = (time.monotonic() - since) / (step - done) * (self._total - step)
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
