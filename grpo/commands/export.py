"""`duologue export`: a checkpoint of a run as a folder that transformers (or, unmerged, peft) loads, with a
model card.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from duologue.grpo.best import BEST, NOTE
from duologue.grpo.checkpoints import latest_checkpoint
from duologue.grpo.commands.card import card
from duologue.model.atomic import write_folder
from duologue.model.checkpoint import is_checkpoint, load_model, parse_dtype, write_checkpoint
from duologue.model.lora import LoraDecoder, merged
from safetensors import SafetensorError


def find_checkpoint(path: Path, best: bool = False) -> Path:
    """The folder itself when it is a checkpoint, or the last one of a run directory, or its best one."""
    if best:
        kept = path / "checkpoints" / BEST
        if not (kept / NOTE).is_file():
            raise ValueError(f"--best: there is no {kept}; accepted is a run with eval.every above 0")
        return kept
    if is_checkpoint(path):
        return path
    latest = latest_checkpoint(path)
    if latest is None:
        raise ValueError(
            f"{path} is neither a checkpoint (it has no config.json) nor a run directory with checkpoints"
        )
    return latest


def run(options: argparse.Namespace) -> int:
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty; accepted is a new folder")
    source = find_checkpoint(options.source, options.best)
    model, tokenizer = load_model(
        source, "cpu", parse_dtype(options.dtype) if options.dtype else None, options.base or ""
    )
    what = "weights"
    if isinstance(model, LoraDecoder):
        what = (
            "adapter, merged into its base" if options.merge else f"adapter of {model.adapter.settings.base}"
        )
        model = merged(model) if options.merge else model
    elif options.merge or options.base:
        option = "--merge" if options.merge else "--base"
        raise ValueError(
            f"{option}: {source} has no adapter, accepted with a checkpoint of a run with lora.rank above 0"
        )
    adapter_of = model.adapter.settings.base if isinstance(model, LoraDecoder) else ""
    text = card(source, out, adapter_of)

    def write(folder: Path) -> None:
        write_checkpoint(model, tokenizer, folder)
        (folder / "README.md").write_text(text, "utf-8")

    try:
        write_folder(out, write)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{out} could not be written: {error}") from error
    size = sum(file.stat().st_size for file in out.rglob("*"))
    print(f"{out}: {what} of {source}, {size / 2**20:,.1f} MiB")
    return 0
