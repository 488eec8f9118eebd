"""What a person sees while a run trains: the numbers that matter, live in a terminal and as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# metric -> (heading, format)
SHOWN = {
    "reward": ("reward", "{:.3f}"),
    "agreement": ("agreed", "{:.1%}"),
    "pareto": ("Pareto", "{:.1%}"),
    "joint_ratio": ("joint", "{:.3f}"),
    "unscored_share": ("unscored", "{:.1%}"),
    "loss": ("loss", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "kl_start": ("KL start", "{:.4f}"),
    "mismatch": ("mismatch", "{:.1e}"),
    "rollout_tokens_per_s": ("rollout tok/s", "{:,.0f}"),
    "update_tokens_per_s": ("update tok/s", "{:,.0f}"),
}
RESULT = {
    "agreement": ("agreement", "{:.1%}"),
    "pareto": ("Pareto-optimal among agreed", "{:.1%}"),
    "joint_ratio": ("joint score / best joint", "{:.3f}"),
    "efficiency": ("right deals where one is possible", "{:.1%}"),
    "right_walks": ("walked away where none is", "{:.1%}"),
    "wrong_deals": ("deals worse than walking away", "{:.1%}"),
    "share_buyer": ("buyer's share of the surplus", "{:.3f}"),
    "share_seller": ("seller's share of the surplus", "{:.3f}"),
    "nash_ratio": ("Nash product / best", "{:.3f}"),
    "score_agreed_0": ("score of side 1, agreed", "{:.2f}"),
    "score_agreed_1": ("score of side 2, agreed", "{:.2f}"),
    "score": ("judge's score from 0 to 5", "{:.2f}"),
    "rounds": ("rounds to agreement", "{:.2f}"),
    "unscored_share": ("unscored", "{:.1%}"),
    "dialogues": ("dialogues", "{:.0f}"),
}


class Progress:
    """`stage`, then `update` after each step. `quiet` shows nothing."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
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
        """`step` steps of the stage are done. A metric that is not measured on every step keeps its latest value."""
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
        for key, (heading, form) in RESULT.items():
            if all(key in c for c in columns.values()):
                table.add_row(heading, *(form.format(c[key]) for c in columns.values()))
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
        return [
            (title, form.format(self._latest[key]))
            for key, (title, form) in SHOWN.items()
            if key in self._latest
        ]

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
