"""`duologue eval CHECKPOINT --ability`: what a policy has kept of its base's language."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duologue.grpo.ability.measure import LEVELS, Subject, measure, subject
from duologue.grpo.build import MEMORY, build_game, build_judge
from duologue.grpo.checkpoints import checkpoint_of
from duologue.grpo.config import Config
from duologue.grpo.partners import start_of, weights_of
from duologue.grpo.policy import load_policy, use_device
from duologue.grpo.run_dir import finite
from duologue.grpo.unsaid import run_of
from duologue.model.atomic import write_file
from rich import box
from rich.console import Console
from rich.table import Table

UNITS = ("prompt", "instruction")


def run(options: argparse.Namespace, resolve: Callable[[], Config]) -> int:
    """`resolve` reads the configuration that options.recipe names."""
    if len(options.players) > 1:
        names = " ".join(options.players)
        raise ValueError(f"{names}: accepted is one checkpoint with --ability, and with --against its base")
    if options.save_dialogues:
        raise ValueError("--save-dialogues: accepted without --ability, which holds no dialogues")
    path = Path(options.players[0])
    recipe = options.recipe or run_of(path)
    options.recipe = str(recipe or "deal")  # whose defaults serve where no game is named
    config = resolve()
    use_device(config)
    began = time.monotonic()
    policy = _loaded(checkpoint_of(path), config)
    base = _base(options.against, path, config)
    found = _measured(config, policy, base, has_game=bool(recipe))
    found["seconds"] = time.monotonic() - began
    console = Console(highlight=False, markup=False)
    console.print(table(found))
    console.print(found["line"], soft_wrap=True)
    if options.json:
        row = {"checkpoint": options.players[0], "against": options.against, **found}
        write_file(options.json, json.dumps(finite(row), indent=2).encode())
    return 0


def _measured(config: Config, policy: Subject, base: Subject | None, has_game: bool) -> dict[str, Any]:
    """With dialogues of the base where there is one, and a game."""
    if base is None or not has_game:
        return measure(config, policy, base, note=_note)
    weights = base.model, base.tokenizer
    judge = build_judge(config, MEMORY, lambda: weights)
    try:
        return measure(config, policy, base, build_game(config), judge, note=_note)
    finally:
        if judge is not None:
            judge.close()


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _loaded(path: Path, config: Config) -> Subject:
    return subject(config, *load_policy(path, config))


def _base(against: str | None, player: Path, config: Config) -> Subject | None:
    """Whom --against names, or what the run began from."""
    if against is None:
        return _loaded(config.model.folder, config) if config.model.path else None
    return _loaded(weights_of(against, start_of(player)), config)


def table(found: dict[str, Any]) -> Table:
    """What `measure` found, for people."""
    prompts = "our own prompts" if found["prompts"] == "ours" else found["prompts"]
    left = [f"{n} left out: {why}" for why, n in found["left_out"].items() if n]
    title = "; ".join([f"{found['asked']} of {prompts}, greedy, {found['max_new_tokens']} tokens", *left])
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for heading in ("base", "policy", "difference", "+ : -", "p"):
        shown.add_column(heading, justify="right")
    for level in LEVELS:
        for unit in UNITS:
            if row := found.get(f"{level}_{unit}"):
                shown.add_row(f"{level}, {unit}s", *_cells(row))
    for key, name in (("plain_text", "text"), ("dialogues", "talk")):
        if row := found.get(key):
            _add_distance(shown, row, name)
    tokens = [f"text: {found['plain_text']['tokens']} tokens"]
    if "dialogues" in found:
        tokens.append(f"talk of the base: {found['dialogues']['tokens']} tokens")
    shown.caption = f"points gained, with 95 % intervals; p is McNemar's; {', '.join(tokens)}"
    shown.caption_justify = "left"
    return shown


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "before" not in row:
        return "", f"{row['after']:.1%}"
    points = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * row[key] for key in ("value", "low", "high")))
    counts = f"{row['gained']} : {row['lost']}"
    return f"{row['before']:.1%}", f"{row['after']:.1%}", points, counts, f"{row['p_value']:.3f}"


def _add_distance(shown: Table, row: dict[str, Any], name: str) -> None:
    if "base_perplexity" not in row:
        shown.add_row(f"perplexity, {name}", "", f"{row['perplexity']:.2f}")
        return
    base, policy = f"{row['base_perplexity']:.2f}", f"{row['perplexity']:.2f}"
    shown.add_row(f"perplexity, {name}", base, policy, f"{100 * row['perplexity_change']:+.1f} %")
    shown.add_row(f"KL base to policy, {name}", "", "", f"{row['kl_base_policy']:.4f}")
    shown.add_row(f"KL policy to base, {name}", "", "", f"{row['kl_policy_base']:.4f}")
