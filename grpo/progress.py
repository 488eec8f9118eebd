"""What a person sees while a run trains: a live line of the numbers that matter, plain lines when there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

# metric -> (heading, format)
SHOWN = {
    "reward": ("reward", "{:.3f}"),
    "agreement": ("agreed", "{:.1%}"),
    "pareto": ("Pareto", "{:.1%}"),
    "joint_ratio": ("joint", "{:.3f}"),
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
    "nash_ratio": ("Nash product / best", "{:.3f}"),
    "score_agreed_0": ("score of side 1, agreed", "{:.2f}"),
    "score_agreed_1": ("score of side 2, agreed", "{:.2f}"),
    "dialogues": ("dialogues", "{:.0f}"),
}


class Progress:
    """`stage`, then `update` after each step. `quiet` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False)
        self._live: Live | None = None
        self._stage = ""
        self._total = 0
        self._begin = (0, 0.0)
        self._last_line = 0.0

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A new stage of `total` steps, of which `done` were done by an earlier process."""
        self.close()
        self._stage, self._total, self._begin = name, total, (done, time.monotonic())
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`step` steps of the stage are done."""
        table = self._table(step, metrics)
        if self._live is not None:
            self._live.update(table)
        elif time.monotonic() - self._last_line > 10 or step == self._total:
            self._last_line = time.monotonic()
            cells = [f"{title} {form.format(metrics[key])}" for key, (title, form) in SHOWN.items() if metrics.get(key) is not None]
            self.console.print(f"{self._stage} {step}/{self._total}  " + "  ".join(cells) + f"  left {self._left(step)}", soft_wrap=True)

    def log(self, message: str) -> None:
        self.console.print(message, soft_wrap=True)

    def results(self, columns: Mapping[str, Mapping[str, float]]) -> None:
        """The table at the end: one column per policy."""
        self.close()
        table = Table(title="held-out scenarios")
        table.add_column("")
        for name in columns:
            table.add_column(name.replace("_", " "), justify="right")
        for key, (title, form) in RESULT.items():
            if all(key in c for c in columns.values()):
                table.add_row(title, *(form.format(c[key]) for c in columns.values()))
        self.console.print(table)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self, step: int, metrics: Mapping[str, Any]) -> Table:
        table = Table(title=f"{self._stage}: step {step} of {self._total}, {self._left(step)} left", box=None, title_justify="left")
        shown = [(t, f.format(metrics[k])) for k, (t, f) in SHOWN.items() if metrics.get(k) is not None]
        for title, _ in shown:
            table.add_column(title, justify="right")
        table.add_row(*(value for _, value in shown))
        return table

    def _left(self, step: int) -> str:
        done, since = self._begin
        if step <= done:
            return "?"
        seconds = (time.monotonic() - since) / (step - done) * (self._total - step)
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
