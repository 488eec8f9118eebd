"""`duologue watch`: a run that is under way, in the terminal, from its files alone."""

from __future__ import annotations

import argparse
import json
import os
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from duologue.grpo.commands.charts import is_number
from duologue.grpo.commands.watched import facts
from duologue.grpo.console import REWARD, TRAINING, UNKNOWN, formatted
from duologue.rollout.games.catalogue import kind_in
from duologue.rollout.games.game import Game
from duologue.rollout.games.texts import read_text
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REFRESH_S = 2.0
TAIL_BYTES = 1 << 18  # of dialogues.jsonl, which may be large: enough for its last line
LATEST = 40  # steps that a curve shows
BLOCKS = "▁▂▃▄▅▆▇█"
OF_DIALOGUES = {  # figures of a line's `watch`: heading, format
    "turn_tokens": ("tokens of a turn", "{:.1f}"),
    "distinct_2": ("different pairs", "{:.1%}"),
    "echo": ("echo", "{:.1%}"),
    "malformed": ("malformed", "{:.1%}"),
}
Row = Mapping[str, Any]


class Lines:
    """The whole lines of a .jsonl file, read as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._end = 0

    def read(self) -> list[Row]:
        """All so far. A file that has become shorter, as by a resume, is read anew."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._end:
            self.rows, self._end = [], 0
        if size > self._end:
            with open(self.path, "rb") as file:
                file.seek(self._end)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._end += len(whole) + len(newline)
            self.rows += [json.loads(line) for line in whole.splitlines()]
        return self.rows


def last_dialogue(path: Path) -> Row | None:
    """The last whole line of dialogues.jsonl; None without one near its end."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        lines = file.read().split(b"\n")
    if len(lines) < 2 or (len(lines) == 2 and path.stat().st_size > TAIL_BYTES):
        return None
    row: Row = json.loads(lines[-2])
    return row


def curve(values: Sequence[float]) -> str:
    """Numbers as blocks of their height between the least and the most."""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def view(run: Path, rows: Sequence[Row]) -> RenderableType:
    """What is shown of a run."""
    config = tomllib.loads(read_text(run / "config.toml"))
    game = kind_in(config["game"])
    if not rows:
        return Text(f"{run}: no step is done yet")
    parts = [_head(run, config, rows), Padding(_table(game, rows), (1, 0))]
    parts += [Text(f"{name}: {what}", "yellow") for name, what in facts(rows, {})]
    if dialogue := last_dialogue(run / "dialogues.jsonl"):
        parts.append(_dialogue(game, dialogue))
    return Group(*parts)


def _head(run: Path, config: Row, rows: Sequence[Row]) -> RenderableType:
    stage, imitation = rows[-1]["stage"], config["imitation"]["steps"]
    of_stage = [row for row in rows if row["stage"] == stage]
    total = imitation if stage == "imitation" else config["train"]["steps"]
    done = rows[-1]["step"] + 1 - (0 if stage == "imitation" else imitation)
    pace = median(row["seconds"] for row in of_stage[-LATEST:])
    left = pace * max(total - done, 0)
    words = (
        f"  step {done} of {total}, {pace:.1f} s each, {left // 60:.0f}:{left % 60:02.0f} left of the stage"
    )
    bar = ProgressBar(total=max(total, 1), completed=done, width=60)
    return Group(Text.assemble((f"{run.resolve().name}  ", "bold"), stage, words), bar)


def _table(game: type[Game], rows: Sequence[Row]) -> Table:
    """A line for each number of the stage: its latest value, and its curve."""
    stage = rows[-1]["stage"]
    of_stage = [{**row.get("watch", {}), **row} for row in rows if row["stage"] == stage]
    of_game = {key: (m.short, m.format) for key, m in game.measures.items() if m.short}
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, (heading, form) in {**REWARD, **of_game, **TRAINING, **OF_DIALOGUES}.items():
        values = [row[key] for row in of_stage if is_number(row.get(key))]
        if values:
            table.add_row(heading, formatted(form, values[-1]), Text(curve(values[-LATEST:]), "cyan"))
    return table


def _dialogue(game: type[Game], record: Row) -> RenderableType:
    shown = game.shown(record)
    lines = [Text(f"the latest dialogue, of step {record['step']}, {record['stage']}", "dim")]
    for turn in record["turns"]:
        lines.append(Text.assemble((f"{shown['sides'][turn['role']]}: ", "bold"), turn["text"]))
    return Group(*lines, Text(shown["verdict"] or UNKNOWN, "dim"))


def run(options: argparse.Namespace) -> int:
    folder: Path = options.run_dir
    if not (folder / "config.toml").is_file():
        raise ValueError(f"{folder} holds no run: it has no config.toml")
    lines, console = Lines(folder / "metrics.jsonl"), Console(highlight=False)
    if options.once or not console.is_terminal:
        console.print(view(folder, lines.read()))
        return 0
    with Live(view(folder, lines.read()), console=console, auto_refresh=False) as live:
        while not (folder / "summary.json").is_file() and _is_locked(folder):
            time.sleep(REFRESH_S)
            live.update(view(folder, lines.read()), refresh=True)
    console.print("the run is finished" if (folder / "summary.json").is_file() else "no process works on it")
    return 0


def _is_locked(folder: Path) -> bool:
    """Whether the process that its lock names is there."""
    text = (folder / ".lock").read_text() if (folder / ".lock").is_file() else ""
    try:
        os.kill(int(text), 0)
    except PermissionError:
        return True
    except (ValueError, OSError):
        return False
    return True
