"""How a game is told where no setting says it: as the run did that a checkpoint is of, and in English to a
checkpoint that was pretrained elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from duologue.grpo.checkpoints import latest_checkpoint
from duologue.grpo.config import RUN_FILE
from duologue.grpo.resume import settings_of
from duologue.model.tokenizer import TEMPLATE

UP = 3  # folders, from a checkpoint to its run


def run_of(checkpoint: Path) -> Path | None:
    """The configuration of the run that a checkpoint, or a run directory, lies in."""
    for folder in (checkpoint, *checkpoint.resolve().parents[:UP]):
        if (folder / RUN_FILE).is_file():
            return folder / RUN_FILE
    return None


def telling_of(run: Path, overrides: Sequence[str]) -> list[str]:
    """The override that tells the game as the run in this folder did, where `overrides` do not say how: one
    of an older version did not write it and told all plainly.
    """
    path = run / RUN_FILE
    if not path.is_file() or any(said.startswith("game.telling=") for said in overrides):
        return []
    telling = settings_of(path).get(("game", "telling"))
    return [f"game.telling={telling}"] if telling else []


def knows_english(player: str | Path) -> bool:
    """Whether a player is a checkpoint that games are told in English. One that lies in no run was made here
    from nothing when it has the compact chat template of such tokenizers.
    """
    folder = Path(player)
    if not folder.is_dir():
        return False
    if run := run_of(folder):
        with contextlib.suppress(ValueError):  # one that cannot be read says nothing
            settings = settings_of(run)
            telling = settings.get(("game", "telling"))
            return telling == "english" if telling else bool(settings["model", "path"])
    template = (latest_checkpoint(folder) or folder) / "chat_template.jinja"
    return not template.is_file() or template.read_text("utf-8") != TEMPLATE
