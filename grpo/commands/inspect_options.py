"""The arguments of `duologue inspect`, apart from what it does: nothing heavy is imported for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_arguments(add: Callable[..., Any]) -> None:
    add("run_dir", type=Path)
    add("--out", type=Path, metavar="FILE", help="the page (default: inspect.html in the run directory)")
    add("--step", type=int, metavar="N", help="of the dialogues of one step alone")
    add("--steps", metavar="A:B", help="of those of the steps from A to B; one of both may be missing")
