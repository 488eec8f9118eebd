"""What a checkpoint decides where no setting says it: how games are told to it, and the type of its weights.
A run's checkpoint is told what its run was, another one English when it was pretrained elsewhere.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from duologue.grpo.checkpoints import checkpoint_of
from duologue.grpo.config import RUN_FILE, Config, load_config
from duologue.grpo.resume import settings_of
from duologue.model.checkpoint import natural_dtype
from duologue.model.hub import folder_of, is_pinned, pinned
from duologue.model.tokenizer import TEMPLATE

KEPT = ("game.telling", "model.dtype")
# Whose defaults on CUDA are others than they once were:
KEPT_ON_CUDA = (
    "train.gradient_accumulation_fusion",
    "train.attention_backward",
    "train.tokens_per_microbatch",
)
UP = 3  # folders, from a checkpoint to its run


def resolved(recipe: str, settings: list[str], run: Path | None, player: str, device: str) -> Config:
    """The configuration, with what a resumed run or else a player decides, and a checkpoint of the Hub
    by its commit.
    """
    left = kept_of(run) if run is not None else unsaid(player, device) if player else {}
    config = load_config(recipe, settings, left)
    path = config.model.path
    if (name := pinned_of(path, run)) == path:
        return config
    return load_config(recipe, [*settings, f"model.path={name}"], left)


def run_of(checkpoint: Path) -> Path | None:
    """The configuration of the run that a checkpoint, or a run directory, lies in."""
    for folder in (checkpoint, *checkpoint.resolve().parents[:UP]):
        if (folder / RUN_FILE).is_file():
            return folder / RUN_FILE
    return None


def kept_of(run: Path) -> dict[str, Any]:
    """How the run in this folder told its game, the type of its weights, and how it adds up gradients: what
    it goes on with where nothing says it. One of an older version did not write the telling, and told all
    plainly.
    """
    path = run / RUN_FILE
    settings = settings_of(path) if path.is_file() else {}
    kept = {f"{section}.{key}": value for (section, key), value in settings.items() if value != ""}
    on_cuda = str(kept.get("model.device")).startswith("cuda")
    return {key: kept[key] for key in (*KEPT, *(KEPT_ON_CUDA if on_cuda else ())) if key in kept}


def pinned_of(place: str, run: Path | None) -> str:
    """A checkpoint's name in the Hub with its commit: that of the run in this folder, if it began with it."""
    path = run and run / RUN_FILE
    began = settings_of(path).get(("model", "path"), "") if path and path.is_file() else ""
    return began if began.startswith(f"{place}@") and is_pinned(began) else pinned(place)


def unsaid(player: str | Path, device: str = "cpu") -> dict[str, str]:
    """What follows from a player where no setting says it: of a checkpoint how games are told and the type of
    its weights, of others nothing.
    """
    folder = folder_of(str(player), weights=False)
    if not folder.is_dir():
        return {}
    found = {"game.telling": "english"} if knows_english(folder) else {}
    folder = checkpoint_of(folder)
    with contextlib.suppress(ValueError):  # of which its reader says more
        if dtype := natural_dtype(folder, device):
            found["model.dtype"] = dtype
    return found


def knows_english(folder: Path) -> bool:
    """Whether games are told in English to a checkpoint, or a run's. One that lies in no run was made here
    from nothing when it has the compact chat template of such tokenizers.
    """
    if run := run_of(folder):
        with contextlib.suppress(ValueError):  # one that cannot be read says nothing
            settings = settings_of(run)
            telling = settings.get(("game", "telling"))
            return telling == "english" if telling else bool(settings["model", "path"])
    template = checkpoint_of(folder) / "chat_template.jinja"
    return not template.is_file() or template.read_text("utf-8") != TEMPLATE
