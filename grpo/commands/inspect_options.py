"""The arguments of `duologue inspect`, apart from what it does: nothing heavy is imported for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXTS = 16


def add_arguments(add: Callable[..., Any]) -> None:
    add("run_dir", type=Path)
    add("--out", type=Path, metavar="FILE", help="the page (default: inspect.html in the run directory)")
    add("--step", type=int, metavar="N", help="of the dialogues of one step alone")
    add("--steps", metavar="A:B", help="of those of the steps from A to B; one of both may be missing")
    two = "and hold dialogues with two of its checkpoints (steps, names, last) on the same contexts"
    add("--checkpoints", nargs=2, metavar=("A", "B"), help=two)
    add(
        "--contexts", type=int, default=CONTEXTS, metavar="N", help=f"how many of these (default: {CONTEXTS})"
    )
    add("--greedy", action="store_true", help="there, take the likeliest token instead of sampling")
    add("--device", help="there, of the models: cpu, cuda or cuda:N (default: the run's)")
