"""`duologue inspect`: every dialogue of a run, token by token, as one HTML file that needs nothing else.

The page holds a list of all dialogues; the words and numbers of 128 at a time are unpacked when one of them
is shown. It loads nothing and sends nothing: its own policy forbids both.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
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
from duologue.grpo.commands.same_contexts import Held, compare, find
from duologue.grpo.config import RUN_FILE, load_config
from duologue.grpo.run_dir import iter_lines
from duologue.model.atomic import write_file
from duologue.rollout.games.catalogue import kind_in
from duologue.rollout.judge.questions import AGREEMENT, SCORE, Prompt, load_prompt

PAGE = "inspect.html"
TEMPLATE = "inspector.html.j2"
ALL = (0, float("inf"))
Steps = tuple[int, float]


def run(options: argparse.Namespace) -> int:
    path = options.out or options.run_dir / PAGE
    steps = steps_of(options.step, options.steps)
    count = write_page(options.run_dir, path, steps, compared(options))
    print(f"{path}: {count:,} dialogues, {path.stat().st_size / 1e6:,.1f} MB")
    return 0


def steps_of(step: int | None, steps: str | None) -> Steps:
    """The first and the last step that are shown."""
    if step is not None and steps is not None:
        raise ValueError("--step and --steps: accepted is one of them")
    if step is not None:
        return step, step
    if steps is None:
        return ALL
    found = re.fullmatch(r"(\d*):(\d*)", steps)
    first, last = (found[1], found[2]) if found else ("", "")
    if not found or (first and last and int(first) > int(last)):
        raise ValueError(f"--steps = {steps!r}: accepted is A:B, the first and the last step")
    return int(first or 0), int(last) if last else float("inf")


def compared(options: argparse.Namespace) -> list[Held]:
    """The dialogues of --checkpoints, none without it."""
    if options.checkpoints is None:
        if options.greedy or options.device:
            raise ValueError("--greedy and --device: accepted with --checkpoints A B")
        return []
    if options.contexts < 1:
        raise ValueError(f"--contexts = {options.contexts}: accepted is 1 or more")
    config_text(options.run_dir)  # says what is wrong with a folder that holds no run
    device = [f"model.device={options.device}"] if options.device else []
    config = load_config(str(options.run_dir / RUN_FILE), device)
    names = [name.rstrip("/") for name in options.checkpoints]
    if names[0] == names[1]:
        raise ValueError(f"--checkpoints {names[0]} {names[1]}: accepted are two that differ")
    folders = {name: find(options.run_dir, name) for name in names}
    return compare(config, folders, options.contexts, options.greedy)


def write_page(run_dir: Path, path: Path, steps: Steps = ALL, held: Sequence[Held] = ()) -> int:
    """Write the page of a run's dialogues, and of those that its checkpoints held now; how many they are."""
    _, config = config_text(run_dir)
    game, prompts = kind_in(config["game"]), _prompts(config)
    dialogues = Dialogues(game, config, any_tokenizer(run_dir), prompts)
    try:
        for of_checkpoint in held:
            for record, other in of_checkpoint.records():
                dialogues.add(record, other)
        for record in _chosen(run_dir / "dialogues.jsonl", steps):
            dialogues.add(record)
    except UNLIKE_A_RUN as error:
        if str(run_dir) in str(error):
            raise
        raise unlike_a_run(run_dir, error) from error
    write_file(path, _page(run_dir.resolve().name, dialogues, config, held).encode())
    return len(dialogues)


def _chosen(path: Path, steps: Steps) -> Iterator[Record]:
    """The records of these steps; ValueError where there are none."""
    first, last = steps
    there: set[int] = set()
    for record in iter_lines(path):
        there.add(record["step"])
        if first <= record["step"] <= last:
            yield record
    if not there:
        raise ValueError(f"{path.parent} has no dialogues yet: they come with its first evaluation")
    if not any(first <= step <= last for step in there):
        wanted = f"--step = {first}" if first == last else f"--steps = {first}:{last:g}"
        raise ValueError(f"{wanted}: accepted are steps of {path}, {min(there)} to {max(there)}")


def _prompts(config: Record) -> dict[str, Prompt]:
    """Those of the run's judge, as their files are now; none where they are gone, or the rules score."""
    judge = config.get("judge", {})
    backend = judge.get("backend", "rules")
    if backend == "rules":
        return {}
    folder, show, held = judge.get("prompts", ""), bool(judge.get("show_dialogue")), backend != "endpoint"
    try:
        return {kind: load_prompt(kind, folder, show, held) for kind in (AGREEMENT, SCORE)}
    except (ValueError, OSError):
        return {}


def _page(name: str, dialogues: Dialogues, config: Record, held: Sequence[Held]) -> str:
    about = {
        "game": config["game"]["name"],
        "recorded": dialogues.recorded,
        "temperatures": [config["dialogue"]["temperature"], config["eval"]["temperature"]],
        "exact": config["rollout"]["exact"],
        "prompts": {kind: prompt.template for kind, prompt in dialogues.prompts.items()},
        "checkpoints": [each.name for each in held],
        "mismatch": max((each.mismatch for each in held), default=0.0),
    }
    return template(TEMPLATE).render(
        name=name,
        about=about,
        index=dialogues.index(),
        count=len(dialogues),
        parts=dialogues.parts,
        facts=packed_json(about),
    )
