"""`duologue inspect`: every dialogue of a run, token by token, as one HTML file that needs nothing else.

The page holds a list of all dialogues; the words and numbers of 128 at a time are unpacked when one of them
is shown. It loads nothing and sends nothing: its own policy forbids both.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from duologue.grpo.commands.inspected import Dialogues, packed_json
from duologue.grpo.commands.records import (
    UNLIKE_A_RUN,
    Record,
    any_tokenizer,
    config_text,
    template,
    unlike_a_run,
)
from duologue.grpo.run_dir import iter_lines
from duologue.model.atomic import write_file
from duologue.rollout.games.catalogue import game_kind
from duologue.rollout.games.game import Game

PAGE = "inspect.html"


def run(options: argparse.Namespace) -> int:
    path = options.out or options.run_dir / PAGE
    count = write_page(options.run_dir, path, steps_of(options.step, options.steps))
    print(f"{path}: {count:,} dialogues, {path.stat().st_size / 1e6:,.1f} MB")
    return 0


def steps_of(step: int | None, steps: str | None) -> tuple[int, float]:
    """The first and the last step that are shown."""
    if step is not None and steps is not None:
        raise ValueError("--step and --steps: accepted is one of them")
    if step is not None:
        return step, step
    if steps is None:
        return 0, float("inf")
    found = re.fullmatch(r"(\d*):(\d*)", steps)
    first, last = (found[1], found[2]) if found else ("", "")
    if not found or (first and last and int(first) > int(last)):
        raise ValueError(f"--steps = {steps!r}: accepted is A:B, the first and the last step")
    return int(first or 0), int(last) if last else float("inf")


def write_page(run_dir: Path, path: Path, steps: tuple[int, float] = (0, float("inf"))) -> int:
    """Write the page of a run's dialogues, and return how many it holds."""
    _, config = config_text(run_dir)
    game = game_kind(config["game"]["name"]) or Game
    dialogues = Dialogues(game, config["grpo"], any_tokenizer(run_dir))
    try:
        for record in _chosen(run_dir / "dialogues.jsonl", steps):
            dialogues.add(record)
    except UNLIKE_A_RUN as error:
        if str(run_dir) in str(error):
            raise
        raise unlike_a_run(run_dir, error) from error
    write_file(path, _page(run_dir.resolve().name, dialogues, _about(config, dialogues)).encode())
    return len(dialogues)


def _chosen(path: Path, steps: tuple[int, float]) -> Iterator[Record]:
    """The records of these steps; ValueError where there are none."""
    first, last = steps
    found, every = 0, (float("inf"), -1)
    for record in iter_lines(path):
        step = record["step"]
        every = min(every[0], step), max(every[1], step)
        if first <= step <= last:
            found += 1
            yield record
    if every[1] < 0:
        raise ValueError(f"{path.parent} has no dialogues yet: they come with its first evaluation")
    if not found:
        wanted = f"step {first}" if first == last else f"steps {first} to {last:g}"
        raise ValueError(f"{path} has no dialogue of {wanted}: accepted are {every[0]:g} to {every[1]:g}")


def _about(config: Record, dialogues: Dialogues) -> Record:
    """What the page says of its numbers."""
    return {
        "game": config["game"]["name"],
        "recorded": dialogues.recorded,
        "every": config["train"].get("record_tokens", 0),
        "temperature": config["dialogue"]["temperature"],
        "exact": config["rollout"]["exact"],
    }


def _page(name: str, dialogues: Dialogues, about: Record) -> str:
    index = dialogues.index()
    return template("inspector.html.j2").render(
        name=name,
        about=about,
        count=len(dialogues),
        index=index,
        parts=dialogues.parts,
        facts=packed_json(about),
    )
